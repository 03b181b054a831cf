"""The systems that D2F is compared with, through the same decoder and backends.

Every one is held against a decoding loop of a few lines over transformers' own model, which
recomputes the whole canvas in each step. Answers are compared token by token and step by step.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch

from d2f_runtime.backends import open_backend
from d2f_runtime.backends.base import Backend, StepRow
from d2f_runtime.decoding.decoder import Accepted, BlockDecoder
from d2f_stream.core.errors import InvalidParams
from d2f_stream.core.params import GenerationParams, Rank
from d2f_stream.core.presets import PRESETS
from reference_loop import MASK as REFERENCE_MASK
from reference_loop import RefSettings, reference_loop
from tiny_models import CONFIGS, MASK, tiny_folder, tiny_model

pytest.importorskip("transformers")

from transformers_oracle import Oracle, Proposal, oracle_model

pytestmark = pytest.mark.torch

PROMPT = (11, 7, 90, 23, 5, 61, 14, 33, 48, 20, 77, 101, 6)
BIDIRECTIONAL = ("llada", "dream")
Trace = list[list[tuple[int, int]]]  # by step: (answer position, token), ascending


@cache
def oracle(family: str) -> Oracle:
    config = CONFIGS[family]
    return Oracle(oracle_model(config, tiny_model(config).state_dict()), config)


@cache
def backend(family: str) -> Backend:
    return open_backend("torch", tiny_folder(family, "torch"), device="cpu", quantization="fp32")


def decode(
    family: str, params: GenerationParams, prompt: Sequence[int] = PROMPT
) -> tuple[Trace, BlockDecoder]:
    runs, info = backend(family), backend(family).info
    decoder = BlockDecoder(
        prompt_tokens=prompt,
        params=params,
        mask_id=info.mask_id,
        eos_ids=info.eos_ids,
        shift_logits=info.shift_logits,
        prompt_attention=info.prompt_attention,
        native_block_size=info.native_block_size,
    )
    slot = runs.open_slot(len(prompt) + params.max_new_tokens)
    trace: Trace = []
    while window := decoder.next_window():
        (proposals,) = runs.step([StepRow(slot, window, rank=params.rank)])
        events = decoder.apply(proposals)
        trace.append([(e.position, e.token) for e in events if isinstance(e, Accepted)])
    runs.close_slot(slot)
    return trace, decoder


def vanilla_loop(
    family: str,
    *,
    num_new: int,
    block_size: int,
    num_per_step: int,
    score: Callable[[Proposal], float],
    stops: Sequence[int],
) -> tuple[Trace, list[int]]:
    """LLaDA's published loop: blocks from left to right, in each step the best of the block."""
    canvas = [*PROMPT, *[MASK] * num_new]
    trace: Trace = []
    for first in range(len(PROMPT), len(canvas), block_size):
        block = range(first, min(first + block_size, len(canvas)))
        while any(canvas[p] == MASK for p in block):
            found = [p for p in oracle(family).proposals(canvas, stops) if p.position in block]
            best = sorted(found, key=score, reverse=True)[:num_per_step]
            for p in best:
                canvas[p.position] = p.token
            trace.append(sorted((p.position - len(PROMPT), p.token) for p in best))
    return trace, canvas[len(PROMPT) :]


SCORES: dict[Rank, Callable[[Proposal], float]] = {
    "confidence": lambda p: p.confidence,
    "margin": lambda p: p.margin,
    "neg_entropy": lambda p: p.neg_entropy,
}


def vanilla(**changes: Any) -> GenerationParams:
    small = {"max_new_tokens": 24, "block_size": 24, **changes}
    return PRESETS["llada-vanilla"].with_overrides(small)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", BIDIRECTIONAL)
@pytest.mark.parametrize("rank", list(SCORES))
@pytest.mark.parametrize(("block_size", "num_per_step"), [(8, 1), (24, 3), (10, 4)])
def test_full_attention_is_vanilla_decoding(
    family: str, rank: Rank, block_size: int, num_per_step: int
) -> None:
    params = vanilla(block_size=block_size, num_per_step=num_per_step, rank=rank)
    trace, decoder = decode(family, params)
    wanted, answer = vanilla_loop(
        family,
        num_new=24,
        block_size=block_size,
        num_per_step=num_per_step,
        score=SCORES[rank],
        stops=(len(PROMPT) + 24,),
    )
    assert trace == wanted
    assert list(decoder.answer_tokens) == answer
    assert decoder.num_cached == 0


@pytest.mark.parametrize("family", BIDIRECTIONAL)
@pytest.mark.parametrize("num_per_step", [1, 4])
def test_one_answer_block_is_vanilla_decoding_blind_to_the_answer(
    family: str, num_per_step: int
) -> None:
    # The prompt's K/V is cached here and recomputed there: it sees nothing of the answer in either.
    params = vanilla(num_per_step=num_per_step, attention="blocks")
    trace, decoder = decode(family, params)
    wanted, answer = vanilla_loop(
        family,
        num_new=24,
        block_size=24,
        num_per_step=num_per_step,
        score=SCORES["confidence"],
        stops=(len(PROMPT), len(PROMPT) + 24),
    )
    assert trace == wanted
    assert list(decoder.answer_tokens) == answer
    assert decoder.num_cached == len(PROMPT)


@pytest.mark.parametrize("family", BIDIRECTIONAL)
def test_a_prompt_that_sees_the_answer_makes_a_difference(
    family: str, record_property: Callable[[str, object], None]
) -> None:
    blind, _ = decode(family, vanilla(attention="blocks"))
    seeing, _ = decode(family, vanilla())
    tokens = [dict(entry for step in trace for entry in step) for trace in (blind, seeing)]
    differing = sum(tokens[0][p] != tokens[1][p] for p in range(24))
    record_property(f"{family}: answer tokens that differ of 24", differing)
    assert differing > 0  # or the two tests above would tell nothing apart


@pytest.mark.parametrize("family", BIDIRECTIONAL)
def test_draining_fills_every_position_and_truncating_gives_its_text_sooner(family: str) -> None:
    eos = backend(family).info.eos_ids
    drained_trace, drained = decode(family, vanilla(block_size=8))
    assert MASK not in drained.answer_tokens
    assert len(drained_trace) == 24
    answer = list(drained.answer_tokens)
    trace, decoder = decode(family, vanilla(block_size=8, stop_at_eos="truncate"))
    ends = [p for p, token in enumerate(answer) if token in eos]
    useful = answer[: ends[0] + 1] if ends else answer
    assert list(decoder.answer_tokens)[: decoder.num_useful_tokens] == useful
    assert trace == drained_trace[: len(trace)]


@pytest.mark.parametrize("family", ["llama", "sdar"])
def test_full_attention_is_refused_where_the_model_is_not_bidirectional(family: str) -> None:
    with pytest.raises(InvalidParams, match="attention is 'full' but must be 'blocks'"):
        decode(family, vanilla())


def test_block_size_1_is_autoregressive_decoding() -> None:
    config = CONFIGS["llama"]
    params = GenerationParams(max_new_tokens=32, block_size=1, stop_at_eos="truncate")
    _, decoder = decode("llama", params)
    forbidden = [config.mask_id, *range(config.num_tokens, config.vocab_size)]
    generated = oracle("llama").model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        max_new_tokens=32,
        do_sample=False,
        eos_token_id=list(config.eos_ids),
        pad_token_id=config.eos_ids[0],
        suppress_tokens=forbidden,
    )[0, len(PROMPT) :]
    assert list(decoder.answer_tokens)[: decoder.num_useful_tokens] == generated.tolist()


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("max_active_blocks", [1, 3, None])
def test_cached_decoding_follows_the_reference_loop(
    family: str, max_active_blocks: int | None
) -> None:
    """D2F with and without its pipeline, block diffusion on a grid, autoregression."""
    config = CONFIGS[family]
    size = config.native_block_size
    params = GenerationParams(
        max_new_tokens=20,
        block_size=size,
        confidence_threshold=0.25,  # random weights are rarely sure
        add_threshold=0.25,
        activate_threshold=0.75,
        max_active_blocks=max_active_blocks,
        stop_at_eos="drain",
    )
    trace, decoder = decode(family, params)
    settings = RefSettings(
        block_size=size,
        max_new_tokens=20,
        block_add_threshold=0.25,
        decoded_token_threshold=0.75,
        skip_threshold=0.25,
        eos_ids=config.eos_ids,
        max_active_blocks=max_active_blocks,
        cut_tail=True,
        grid=config.prompt_attention == "grid",
    )
    found = reference_loop(PROMPT, proposer(family), settings)
    wanted = [
        sorted((p - len(PROMPT), swapped(token)) for p, token in step.accepted)
        for step in found.steps
    ]
    assert [sorted(step) for step in trace] == wanted
    assert list(decoder.answer_tokens) == [swapped(t) for t in found.canvas[len(PROMPT) :]]


def swapped(token: int) -> int:
    """Between the ids of the model and those of the reference loop, whose mask is another."""
    return {MASK: REFERENCE_MASK, REFERENCE_MASK: MASK}.get(token, token)


def proposer(family: str) -> Callable[[tuple[int, ...], int, int], tuple[int, float, float]]:
    """The oracle as the reference loop asks it: for one position, from all that it sees."""

    @cache
    def answers(visible: tuple[int, ...]) -> dict[int, Proposal]:
        stops = attention_stops(family, visible)
        found = oracle(family).proposals([swapped(token) for token in visible], stops)
        return {p.position: p for p in found}

    def propose(visible: tuple[int, ...], position: int, _: int) -> tuple[int, float, float]:
        p = answers(visible)[position]
        return swapped(p.token), p.confidence, p.confidence

    return propose


def attention_stops(family: str, visible: tuple[int, ...]) -> tuple[int, ...]:
    """The edges of a canvas that ends with its last block, from the definitions."""
    num_prompt, size, length = len(PROMPT), CONFIGS[family].native_block_size, len(visible)
    match CONFIGS[family].prompt_attention:
        case "causal":  # ... also of answer blocks once all before them and they are filled
            filled = (*visible, REFERENCE_MASK).index(REFERENCE_MASK)
            committed = num_prompt + (filled - num_prompt) // size * size
            return (*range(1, committed + 1), *range(committed + size, length, size), length)
        case "grid":
            return (*range(size, length, size), length)
        case "full":
            return (num_prompt, *range(num_prompt + size, length, size), length)
        case other:
            raise AssertionError(f"none of these families has a prompt of {other}")
