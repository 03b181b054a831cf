"""Models converted by dllm: logits and answers like those of the published sampler."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import block_loops
import d2f_stream
from d2f_runtime.models.checkpoints import load_checkpoint
from published_canvases import LENGTH, PROMPT, TOLERANCE, canvas_of, until_eos, whole
from tiny_checkpoints import (
    FAMILIES,
    Tiny,
    added_tokens,
    additive,
    block_causal,
    oracle,
    write_checkpoint,
    write_model,
)

pytest.importorskip("transformers")
pytestmark = pytest.mark.torch


def bd3lm_sampler(model: Any, tiny: Tiny, size: int, num_tokens: int, per_block: int) -> list[int]:
    """The published sampler for converted models, on the prompt padded from the left, in fp64.

    Padding is invisible and has no position; nothing is cached; the schedule is the linear one.
    """
    ids = added_tokens(tiny)
    assert tiny.mask is not None
    mask, padding = ids[tiny.mask], -len(PROMPT) % size
    canvas = [0] * padding + PROMPT
    ends = [ids[text] for text in tiny.ends]
    for first in range(0, num_tokens, size):
        begin, width = len(canvas), min(size, num_tokens - first)
        canvas += [mask] * width
        for number in block_loops.linear(width, per_block):
            blocks = torch.arange(len(canvas)) // size
            visible = blocks[None, :] <= blocks[:, None]
            visible[:, :padding] = False
            visible[torch.arange(padding), torch.arange(padding)] = True
            positions = (torch.arange(len(canvas)) - padding).clamp(min=0)
            with torch.no_grad():
                logits = model(
                    torch.tensor([canvas]),
                    attention_mask=additive(visible).double(),
                    position_ids=positions[None],
                    use_cache=False,
                ).logits[0]
            logits[:, mask] = logits[:, max(ids.values()) + 1 :] = -torch.inf
            best = logits.softmax(-1).max(-1)
            masked = [at for at in range(begin, len(canvas)) if canvas[at] == mask]
            masked.sort(key=lambda at: -float(best.values[at]))
            for at in masked[:number]:
                canvas[at] = int(best.indices[at])
        if set(ends) & set(canvas[begin:]):
            break
    return until_eos(canvas[padding + len(PROMPT) :], ends)


@pytest.mark.parametrize("model_type", ["a2d-qwen3", "a2d-qwen2"])
@pytest.mark.parametrize(("size", "per_step"), [(8, 1), (8, 2), (4, 1), (16, 4)])
async def test_converted_models_answer_as_the_published_sampler(
    tmp_path: Path, model_type: str, size: int, per_step: int
) -> None:
    tiny = FAMILIES[model_type]
    theirs = oracle(tiny, seed=5)
    write_checkpoint(tmp_path, tiny, theirs, block_size=size)
    number = 3 * size + 1 if per_step == 1 else 3 * size  # the last block may be shorter
    if per_step == 1:
        wanted = bd3lm_sampler(theirs.double(), tiny, size, number, size)
    else:
        wanted = bd3lm_sampler(theirs.double(), tiny, size, number, size // per_step)
    async with d2f_stream.load(tmp_path, device="cpu") as engine:
        result = await engine.generate(
            PROMPT, max_new_tokens=number, num_per_step=per_step
        ).result()
    assert list(result.token_ids) == wanted


@pytest.mark.parametrize("model_type", ["a2d-qwen3", "a2d-qwen2"])
def test_logits_of_converted_models_equal_those_in_fp64(tmp_path: Path, model_type: str) -> None:
    tiny = FAMILIES[model_type]
    theirs = oracle(tiny)
    write_checkpoint(tmp_path, tiny, theirs)
    ours, tokens = load_checkpoint(tmp_path).eval(), canvas_of(tiny)
    visible = block_causal(LENGTH, [3, 11, 19, 27, LENGTH])
    with torch.no_grad():
        mask = additive(visible).double()
        wanted = theirs.double()(tokens, attention_mask=mask, use_cache=False).logits
        assert (whole(ours, tokens, visible) - wanted).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("model_type", "length"), [("a2d-qwen3", 5), ("a2d-qwen2", 5), ("qwen3", 2)]
)
async def test_chats_open_no_thoughts(tmp_path: Path, model_type: str, length: int) -> None:
    write_model(tmp_path, model_type)
    path = tmp_path / "tokenizer_config.json"
    closed = "{% if enable_thinking is defined and not enable_thinking %}!!!{% endif %}"
    template = {"chat_template": "{{ messages[0].content }}" + closed}
    path.write_text(json.dumps(json.loads(path.read_text()) | template))
    async with d2f_stream.load(tmp_path, device="cpu") as engine:
        messages = [{"role": "user", "content": "~~"}]
        result = await engine.generate(messages, max_new_tokens=1).result()
    assert result.usage.prompt_tokens == length
