"""Checkpoints in the published layouts against transformers' own classes, end to end by path."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import d2f_stream
import reference_loop
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_runtime.models.transformer import Transformer
from d2f_stream.core.presets import PRESETS
from published_canvases import LENGTH, PROMPT, TOLERANCE, canvas_of, until_eos, whole
from tiny_checkpoints import (
    FAMILIES,
    Tiny,
    added_tokens,
    additive,
    block_causal,
    oracle,
    write_adapter,
    write_checkpoint,
    write_model,
)

pytest.importorskip("transformers")
pytestmark = pytest.mark.torch


@pytest.fixture(params=list(FAMILIES))
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return FAMILIES[request.param]


def stops_of(tiny: Tiny) -> list[int]:
    """Attention blocks of a canvas of 30: what the family sees."""
    if tiny.attention == "causal":
        return list(range(1, LENGTH + 1))
    if isinstance(tiny.attention, int):
        return [*range(tiny.attention, LENGTH, tiny.attention), LENGTH]
    return [11, 17, 25, LENGTH]


def in_two(model: Transformer, tokens: Tensor, visible: Tensor, edge: int) -> Tensor:
    """Cache the canvas up to an edge, then run the rest over the cache."""
    first, past = model(
        tokens[:, :edge], torch.arange(edge)[None], visible[None, None, :edge, :edge]
    )
    rest, _ = model(
        tokens[:, edge:], torch.arange(edge, LENGTH)[None], visible[None, None, edge:], past
    )
    return model.logits(torch.cat([first, rest], dim=1))


@pytest.mark.parametrize(("num_shards", "with_adapter"), [(1, False), (3, True)])
@torch.no_grad()
def test_logits_equal_the_oracle(
    tmp_path: Path, tiny: Tiny, num_shards: int, with_adapter: bool
) -> None:
    theirs = oracle(tiny)
    write_checkpoint(tmp_path / "base", tiny, theirs, num_shards=num_shards)
    adapter = None
    if with_adapter:
        adapter = tmp_path / "adapter"
        write_adapter(adapter, tiny, theirs.state_dict())
    ours = load_checkpoint(tmp_path / "base", adapter=adapter).eval()
    tokens, stops = canvas_of(tiny), stops_of(tiny)
    for edges in (stops, [LENGTH]) if tiny.attention == "full" else (stops,):
        visible = block_causal(LENGTH, edges)
        wanted = theirs(tokens, attention_mask=additive(visible), use_cache=False).logits
        assert wanted.std() > 0.5  # or the tolerance would hide a mistake
        assert (whole(ours, tokens, visible) - wanted).abs().max() <= TOLERANCE
    edge = stops[len(stops) // 2 - 1]
    visible = block_causal(LENGTH, stops)
    wanted = theirs(tokens, attention_mask=additive(visible), use_cache=False).logits
    assert (in_two(ours, tokens, visible, edge) - wanted).abs().max() <= TOLERANCE


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_what_transformers_itself_saves_is_read(tmp_path: Path, model_type: str) -> None:
    theirs = oracle(FAMILIES[model_type])
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": 1}))
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    ours = load_checkpoint(tmp_path).eval()
    tokens, visible = canvas_of(FAMILIES[model_type]), torch.ones(LENGTH, LENGTH).tril().bool()
    with torch.no_grad():
        wanted = theirs(tokens, use_cache=False).logits
        assert (whole(ours, tokens, visible) - wanted).abs().max() <= TOLERANCE


async def test_requests_lie_over_the_generation_config(tmp_path: Path) -> None:
    write_model(tmp_path, "llada")
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"max_new_tokens": 12, "do_sample": True, "temperature": 0.5}))
    async with d2f_stream.load(tmp_path, device="cpu") as engine:
        first = await engine.generate(PROMPT, seed=1).result()
        second = await engine.generate(PROMPT, seed=2).result()
        greedy = [
            await engine.generate(PROMPT, temperature=0.0, max_new_tokens=5, seed=seed).result()
            for seed in (1, 2)
        ]
    assert first.usage.completion_tokens <= 12
    assert first.token_ids != second.token_ids
    assert greedy[0].token_ids == greedy[1].token_ids
    assert greedy[0].usage.completion_tokens <= 5


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
async def test_greedy_answers_equal_those_of_transformers(tmp_path: Path, model_type: str) -> None:
    theirs = write_model(tmp_path, model_type)
    tiny = FAMILIES[model_type]
    ends = sorted(added_tokens(tiny)[text] for text in tiny.ends)
    with torch.no_grad():
        wanted = theirs.generate(
            torch.tensor([PROMPT]),
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=ends[0],
            suppress_tokens=list(range(max(added_tokens(tiny).values()) + 1, 320)) or None,
        )[0, len(PROMPT) :].tolist()
    async with d2f_stream.load(tmp_path, device="cpu") as engine:
        result = await engine.generate(PROMPT, max_new_tokens=40).result()
    assert list(result.token_ids) == wanted
    assert result.usage.steps == len(wanted)


class Proposer:
    """The reference loop's `propose`, answered by transformers' model and a mask of its own."""

    def __init__(self, model: Any, tiny: Tiny, *, block_size: int) -> None:
        self.model = model
        self.tiny = tiny
        self.block_size = block_size
        self.seen: dict[tuple[int, ...], tuple[list[int], list[float]]] = {}

    def __call__(self, visible: tuple[int, ...], position: int, step: int) -> Any:
        if visible not in self.seen:
            self.seen[visible] = self._run(visible)
        tokens, confidence = self.seen[visible]
        return tokens[position], confidence[position], confidence[position]

    @torch.no_grad()
    def _run(self, tokens: tuple[int, ...]) -> tuple[list[int], list[float]]:
        size = self.block_size
        origin = 0 if isinstance(self.tiny.attention, int) else len(PROMPT)
        if self.tiny.attention == "prompt_grid":
            origin = len(PROMPT) % size
        stops = [*range(origin, len(tokens), size), len(tokens)]
        mask = additive(block_causal(len(tokens), stops))
        logits = self.model(torch.tensor([tokens]), attention_mask=mask, use_cache=False).logits[0]
        if self.tiny.shifted:
            logits = logits.roll(1, dims=0)
        ids = added_tokens(self.tiny)
        assert self.tiny.mask is not None
        logits[:, ids[self.tiny.mask]] = -torch.inf
        logits[:, max(ids.values()) + 1 :] = -torch.inf
        best = logits.softmax(-1).max(-1)
        return best.indices.tolist(), best.values.tolist()


@pytest.mark.parametrize(
    "model_type",
    ["llada", "Dream", "sdar", "stable-diffcoder", "Fast_dLLM_Qwen", "a2d-qwen3", "a2d-qwen2"],
)
@pytest.mark.parametrize(
    ("pipelined", "with_adapter"),
    [(True, False), (False, False), (True, True)],
)
async def test_block_answers_equal_the_reference_loop(
    tmp_path: Path,
    model_type: str,
    pipelined: bool,
    with_adapter: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny = FAMILIES[model_type]
    theirs = oracle(tiny, seed=3)
    changes = {"block_size": 8} if tiny.attention == "prompt_grid" else {}
    write_checkpoint(tmp_path / "base", tiny, theirs, num_shards=2, **changes)
    adapter = tmp_path / "adapter" if with_adapter else None
    if adapter is not None:
        write_adapter(adapter, tiny, theirs.state_dict())
    ids = added_tokens(tiny)
    assert tiny.mask is not None
    block_size = tiny.attention if isinstance(tiny.attention, int) else 8
    monkeypatch.setattr(reference_loop, "MASK", ids[tiny.mask])
    settings = reference_loop.RefSettings(
        block_size=block_size,
        max_new_tokens=5 * block_size,
        block_add_threshold=0.3 if pipelined else 1.0,
        decoded_token_threshold=0.8,
        skip_threshold=0.3,
        eos_ids=[ids[text] for text in tiny.ends],
        max_active_blocks=3 if pipelined else 1,
        cut_tail=True,
        grid=isinstance(tiny.attention, int),
    )
    wanted = reference_loop.reference_loop(
        PROMPT, Proposer(theirs, tiny, block_size=block_size), settings
    )
    async with d2f_stream.load(tmp_path / "base", adapter=adapter, device="cpu") as engine:
        result = await engine.generate(
            PROMPT,
            max_new_tokens=settings.max_new_tokens,
            block_size=block_size,
            add_threshold=settings.block_add_threshold,
            activate_threshold=0.8,
            confidence_threshold=0.3,
            max_active_blocks=settings.max_active_blocks,
            sub_block_size=0,
            num_per_step=0,
            temperature=0.0,
            stop_at_eos="drain",
        ).result()
    assert list(result.token_ids) == until_eos(wanted.canvas[len(PROMPT) :], settings.eos_ids)
    assert result.usage.steps == len(wanted.steps)


@pytest.mark.parametrize(
    ("model_type", "preset", "block_size"),
    [("llada", "llada-vanilla", 8), ("Dream", "dream-vanilla", 24)],
)
async def test_vanilla_answers_equal_the_published_loop(
    tmp_path: Path, model_type: str, preset: str, block_size: int
) -> None:
    theirs, tiny = write_model(tmp_path, model_type, seed=3), FAMILIES[model_type]
    ids = added_tokens(tiny)
    assert tiny.mask is not None
    mask, length = ids[tiny.mask], len(PROMPT) + 24
    canvas = torch.tensor([[*PROMPT, *[mask] * 24]])
    for first in range(len(PROMPT), length, block_size):
        for _ in range(block_size):
            with torch.no_grad():
                everything = additive(torch.ones(length, length, dtype=torch.bool))
                logits = theirs(canvas, attention_mask=everything, use_cache=False).logits[0]
            logits = logits.roll(1, dims=0) if tiny.shifted else logits
            logits[:, mask] = logits[:, max(ids.values()) + 1 :] = -torch.inf
            p = logits.softmax(-1)
            best = p.max(-1)
            score = best.values if model_type == "llada" else (p * (p + 1e-10).log()).sum(-1)
            inside = torch.zeros(length, dtype=torch.bool)
            inside[first : first + block_size] = True
            score[~inside | (canvas[0] != mask)] = -torch.inf
            at = int(score.argmax())
            canvas[0, at] = best.indices[at]
    async with d2f_stream.load(tmp_path, device="cpu") as engine:
        params = PRESETS[preset].with_overrides({"max_new_tokens": 24, "block_size": block_size})
        result = await engine.generate(PROMPT, params).result()
    ends = [ids[text] for text in tiny.ends]
    assert list(result.token_ids) == until_eos(canvas[0, len(PROMPT) :].tolist(), ends)
    assert result.usage.steps == 24


@pytest.mark.parametrize(
    ("model_type", "rendered"),
    [
        ("Dream", "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"),
        (
            "llada",
            "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHow many?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ],
)
async def test_chat_messages_go_through_the_models_template(
    tmp_path: Path, model_type: str, rendered: str
) -> None:
    write_model(tmp_path, model_type)
    async with d2f_stream.load(tmp_path, device="cpu") as engine:
        chat = [{"role": "user", "content": "How many?"}]
        first = await engine.generate(chat, max_new_tokens=8, temperature=0.0).result()
        second = await engine.generate(
            rendered, raw=True, max_new_tokens=8, temperature=0.0
        ).result()
    assert first.usage.prompt_tokens == second.usage.prompt_tokens > 10
    assert first.token_ids == second.token_ids
