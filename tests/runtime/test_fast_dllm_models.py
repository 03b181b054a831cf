"""Fast-dLLM v2's sub-blocks over tiny checkpoints: each step is that of the published loop.

The loop asks transformers' own model, which recomputes the whole canvas in each step.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import d2f_stream
from d2f_runtime.backends import open_backend
from d2f_runtime.backends.base import Backend, StepRow
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.decoding.decoder import BlockDecoder
from d2f_runtime.models.published import read_published
from d2f_stream.core.presets import PRESETS
from fast_dllm_loop import FastDllmLoop, filling, steps_of
from tiny_checkpoints import FAMILIES, oracle, write_checkpoint
from tiny_models import CONFIGS, tiny_folder, tiny_model

pytest.importorskip("transformers")

from transformers_oracle import Oracle, oracle_model

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def tiny() -> Oracle:
    config = CONFIGS["fast_dllm_v2"]
    return Oracle(oracle_model(config, tiny_model(config).state_dict()), config)


@pytest.fixture(scope="module", params=["torch", "fast-references", "onnx"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    opened: Backend
    if request.param == "fast-references":  # the fast step's code over plain kernels
        opened = TorchBackend(tiny_model(CONFIGS["fast_dllm_v2"]), name="fast", runner="fast")
    else:
        folder = tiny_folder("fast_dllm_v2", "torch" if request.param == "torch" else "fp32")
        opened = open_backend(request.param, folder, device="cpu", quantization="auto")
    yield opened
    opened.close()


@pytest.mark.parametrize("num_prompt", [3, 8, 13, 16])
@pytest.mark.parametrize(("small", "threshold"), [(2, 0.3), (4, 0.9), (8, 0.5)])
def test_every_step_is_the_published_one(
    tiny: Oracle, backend: Backend, num_prompt: int, small: int, threshold: float
) -> None:
    info = backend.info
    prompt = [4 + 7 * i % 140 for i in range(num_prompt)]
    loop = FastDllmLoop(
        proposer(tiny), info.mask_id, info.eos_ids, info.native_block_size, small, threshold
    )
    loop.run(prompt, 32)
    params = PRESETS["fast-dllm-v2"].with_overrides(
        {
            "max_new_tokens": 32,
            "sub_block_size": small,
            "confidence_threshold": threshold,
            "tail": "drop",
        }
    )
    decoder = BlockDecoder(
        prompt_tokens=prompt,
        params=params,
        mask_id=info.mask_id,
        eos_ids=info.eos_ids,
        shift_logits=info.shift_logits,
        prompt_attention=info.prompt_attention,
        native_block_size=info.native_block_size,
    )
    slot = backend.open_slot(num_prompt + 32)
    trace = steps_of(decoder, num_prompt, lambda w: backend.step([StepRow(slot, w)])[0])
    backend.close_slot(slot)
    assert trace == filling(loop.steps, num_prompt + 32 - num_prompt % 8)


async def test_a_checkpoint_decodes_so_by_default(tmp_path: Path) -> None:
    family = FAMILIES["Fast_dLLM_Qwen"]
    theirs = oracle(family, seed=5, bd_size=16)
    write_checkpoint(tmp_path, family, theirs)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"bd_size": 8', '"bd_size": 16'))
    read = read_published(tmp_path).config
    prompt = [40, 41, 60, 8, 120, 7, 55, 90, 33, 14, 200]
    loop = FastDllmLoop(
        proposer(Oracle(theirs, read)), read.mask_id, read.eos_ids, 16, 8, threshold=0.9
    )
    loop.run(prompt, 48)
    async with d2f_stream.load(tmp_path, device="cpu") as engine:
        assert engine.defaults.sub_block_size == 8
        result = await engine.generate(prompt, max_new_tokens=48, tail="drop").result()
    end = 48 if result.reason == "length" else len(prompt) + len(result.token_ids)
    assert list(result.token_ids) == loop.x[len(prompt) : end]
    assert result.usage.steps == len(filling(loop.steps, 48))


def proposer(oracle: Oracle) -> Callable[[tuple[int, ...], int], tuple[int, float]]:
    """What transformers' model says of one position of a canvas, its last block included."""
    size = oracle.config.native_block_size
    answers: dict[tuple[int, ...], dict[int, tuple[int, float]]] = {}

    def propose(visible: tuple[int, ...], position: int) -> tuple[int, float]:
        if visible not in answers:
            found = oracle.proposals(visible, (*range(size, len(visible), size), len(visible)))
            answers[visible] = {p.position: (p.token, p.confidence) for p in found}
        return answers[visible][position]

    return propose
