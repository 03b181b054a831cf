"""Mixtures of experts: answers like those of the published loops."""

from pathlib import Path
from typing import Any

import pytest
import torch

import block_loops
import d2f_stream
from block_loops import Loop
from d2f_stream.core.presets import PRESETS
from tiny_checkpoints import (
    FAMILIES,
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


def oracle_proposer(model: Any, model_type: str, size: int) -> block_loops.Propose:
    ids = added_tokens(FAMILIES[model_type])
    mask = FAMILIES[model_type].mask
    assert mask is not None
    seen: dict[tuple[int, ...], tuple[list[int], list[float]]] = {}

    @torch.no_grad()
    def run(canvas: tuple[int, ...]) -> tuple[list[int], list[float]]:
        stops = [*range(size, len(canvas), size), len(canvas)]
        visible = additive(block_causal(len(canvas), stops))
        out = model(torch.tensor([canvas]), attention_mask=visible, use_cache=False).logits[0]
        out[:, ids[mask]] = out[:, max(ids.values()) + 1 :] = -torch.inf
        best = out.softmax(-1).max(-1)
        return best.indices.tolist(), best.values.tolist()

    def propose(canvas: tuple[int, ...], position: int) -> tuple[int, float]:
        if canvas not in seen:
            seen[canvas] = run(canvas)
        tokens, confidence = seen[canvas]
        return tokens[position], confidence[position]

    return propose


PROMPT = [40, 41, 60, 8, 120, 7, 55, 90, 33, 14, 200]


@pytest.mark.parametrize("model_type", ["llada2_moe", "sdar_moe"])
@pytest.mark.parametrize("with_adapter", [False, True])
async def test_answers_are_those_of_the_published_loop(
    tmp_path: Path, model_type: str, with_adapter: bool
) -> None:
    tiny = FAMILIES[model_type]
    size, ids = int(tiny.attention), added_tokens(tiny)
    theirs = oracle(tiny, seed=3)
    write_checkpoint(tmp_path / "base", tiny, theirs, num_shards=2)
    adapter = tmp_path / "adapter" if with_adapter else None
    if adapter is not None:
        write_adapter(adapter, tiny, theirs.state_dict())
    assert tiny.mask is not None
    ends = [ids[text] for text in tiny.ends]
    loop = Loop(oracle_proposer(theirs, model_type, size), ids[tiny.mask], ends, size)
    rule = block_loops.dynamic([1] * size, 0.3)
    block_loops.block_loop(loop, PROMPT, 26, rule)
    async with d2f_stream.load(tmp_path / "base", adapter=adapter, device="cpu") as engine:
        result = await engine.generate(
            PROMPT, max_new_tokens=26, confidence_threshold=0.3, tail="whole", stop_at_eos="drain"
        ).result()
    assert list(result.token_ids) == loop.answer(len(PROMPT), 26)
    assert result.usage.steps == loop.num_forwards


async def test_edited_answers_are_those_of_the_published_loop(tmp_path: Path) -> None:
    tiny, folder = FAMILIES["llada2_moe"], tmp_path / "LLaDA2.1-tiny"
    size, ids = int(tiny.attention), added_tokens(tiny)
    theirs = write_model(folder, "llada2_moe", seed=3)
    assert tiny.mask is not None
    ends = [ids[text] for text in tiny.ends]
    loop = Loop(oracle_proposer(theirs, "llada2_moe", size), ids[tiny.mask], ends, size)
    block_loops.joint_threshold(
        loop, PROMPT, 26, threshold=0.3, editing_threshold=0.1, max_post_steps=16, stops_early=True
    )
    async with d2f_stream.load(folder, device="cpu") as engine:
        assert engine.defaults.edit_threshold == PRESETS["llada2.1"].edit_threshold
        result = await engine.generate(
            PROMPT, max_new_tokens=26, confidence_threshold=0.3, edit_threshold=0.1
        ).result()
    assert list(result.token_ids) == loop.answer(len(PROMPT), 26)
    assert result.usage.steps == loop.num_forwards
