"""Fast-dLLM v2 as published: ordered sub-blocks, and a block's first token at once.

Held against a naive reading of the published loop over a function of what a position sees.
"""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_runtime.decoding.blocks import SubBlocks
from d2f_runtime.decoding.decoder import Accepted, BlockDecoder
from d2f_runtime.decoding.window import NO_TOKEN, Proposals, Window
from d2f_stream.core.params import GenerationParams
from d2f_stream.core.presets import PRESETS
from decoding import LEVELS, HashModel
from fakes import ANSWER, engine_over, info
from fast_dllm_loop import FastDllmLoop, filling, steps_of
from stepping import EOS, M, pending, step


def fast_dllm(**changes: Any) -> GenerationParams:
    return PRESETS["fast-dllm-v2"].with_overrides({"tail": "drop", **changes})  # type: ignore[typeddict-item]


@given(
    seed=st.integers(0, 2**32),
    num_prompt=st.integers(1, 40),
    sizes=st.sampled_from([(4, 2), (8, 8), (8, 1), (8, 3), (16, 4), (32, 8)]),
    num_blocks=st.integers(1, 4),
    level=st.integers(1, LEVELS),
    eos_share=st.sampled_from([0.0, 0.02, 0.2]),
)
@settings(max_examples=100)
def test_every_step_is_the_published_one(
    seed: int,
    num_prompt: int,
    sizes: tuple[int, int],
    num_blocks: int,
    level: int,
    eos_share: float,
) -> None:
    block_size, small = sizes
    rnd = random.Random(seed)
    prompt = [rnd.choice((EOS, 10, 11)) for _ in range(num_prompt)]
    model = HashModel(seed, (EOS, 2), eos_share, skew=rnd.randint(-2, 2), by_step=False)

    def propose(visible: tuple[int, ...], position: int) -> tuple[int, float]:
        token, confidence, _ = model(visible, position, 0)
        return token, confidence

    loop = FastDllmLoop(propose, M, (EOS, 2), block_size, small, level / LEVELS)
    loop.run(prompt, num_blocks * block_size)
    params = fast_dllm(
        max_new_tokens=num_blocks * block_size,
        block_size=1,  # plays no part on a grid
        sub_block_size=small,
        confidence_threshold=level / LEVELS,
    )
    decoder = BlockDecoder(
        prompt_tokens=prompt,
        params=params,
        mask_id=M,
        eos_ids=(EOS, 2),
        shift_logits=True,
        prompt_attention="grid",
        native_block_size=block_size,
    )
    cache: list[int] = []

    def answer(window: Window) -> Proposals:
        del cache[window.start :]
        canvas = (*cache, *window.tokens)
        stops = window.visible_until()
        rows = [
            propose(canvas[:stop], window.start + row) if token == M else (NO_TOKEN, 0.0)
            for row, (token, stop) in enumerate(zip(window.tokens, stops, strict=True))
        ]
        cache.extend(window.tokens[: window.num_to_cache])
        return Proposals([token for token, _ in rows], [value for _, value in rows])

    trace = steps_of(decoder, num_prompt, answer)
    end = num_prompt + num_blocks * block_size - num_prompt % block_size
    wanted = filling(loop.steps, end)
    assert trace == wanted
    useful = decoder.answer_tokens[: decoder.num_useful_tokens]
    assert [*prompt, *useful] == loop.x[: num_prompt + len(useful)]


def on_grid(num_prompt: int, **changes: Any) -> BlockDecoder:
    """Return a decoder of blocks of eight with sub-blocks of four on a shifted model."""
    params = PRESETS["fast-dllm-v2"].with_overrides(
        {"max_new_tokens": 24, "sub_block_size": 4, **changes}  # type: ignore[typeddict-item]
    )
    return BlockDecoder(
        prompt_tokens=range(10, 10 + num_prompt),
        params=params,
        mask_id=M,
        eos_ids=(EOS,),
        shift_logits=True,
        prompt_attention="grid",
        native_block_size=8,
    )


def test_only_the_leftmost_unfinished_sub_block_accepts() -> None:
    decoder = on_grid(9)
    sure = {p: 20 + p for p in range(7)}
    assert step(decoder, sure, num_prompt=9) == [Accepted(p, 20 + p) for p in range(3)]
    events = step(decoder, sure, num_prompt=9)
    assert events[:4] == [Accepted(p, 20 + p) for p in range(3, 7)]


def test_first_token_is_taken_at_once_and_alone() -> None:
    decoder = on_grid(8)
    assert decoder.next_window() == Window(0, (*range(10, 18), M), 8, (8, 9))
    assert step(decoder, {}, num_prompt=8) == [Accepted(0, 50)]  # far below the threshold
    assert decoder.next_window() == Window(8, (50, *[M] * 7), 0, (16,))


def test_a_waiting_block_behind_an_unfinished_one_shows_its_first_position_only() -> None:
    decoder = on_grid(8, add_threshold=0.1, activate_threshold=1.0, max_active_blocks=3)
    step(decoder, {}, num_prompt=8)
    window = pending(decoder)
    assert (len(window.tokens), window.block_stops) == (9, (16, 17))
    events = step(decoder, {1: 21, 8: 28}, num_prompt=8)
    assert events == [Accepted(1, 21), Accepted(8, 28)]
    assert pending(decoder).block_stops == (16, 24, 25)


def test_a_model_without_shifted_logits_has_no_first_token() -> None:
    decoder = BlockDecoder(
        prompt_tokens=range(10, 18),
        params=GenerationParams(max_new_tokens=8, sub_block_size=4),
        mask_id=M,
        eos_ids=(EOS,),
        prompt_attention="grid",
        native_block_size=8,
    )
    assert pending(decoder).block_stops == (8, 16)
    sure = {p: 20 + p for p in range(8)}
    assert step(decoder, sure, num_prompt=8) == [Accepted(p, 20 + p) for p in range(4)]


@pytest.mark.parametrize(
    ("masked", "size", "first_alone", "wanted"),
    [
        ([0, 1, 5], 0, False, [0, 1, 5]),
        ([0, 1, 3, 4], 4, False, [0, 1, 3]),
        ([0, 1, 3, 4], 4, True, [0]),
        ([1, 3, 4], 4, True, [1, 3]),
        ([5, 7, 8], 4, True, [5, 7]),
        ([3, 9], 100, True, [3, 9]),
    ],
)
def test_open_offsets(
    masked: Sequence[int], size: int, first_alone: bool, wanted: Sequence[int]
) -> None:
    assert list(SubBlocks(size, first_alone).open(masked)) == wanted


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("pipelined", [{}, {"max_active_blocks": 3, "add_threshold": 0.3}])
async def test_sessions_share_an_engine(drafts: bool, pipelined: dict[str, Any]) -> None:
    on_grid = info(prompt_attention="grid", shift_logits=True, native_block_size=8)
    backend = ScriptedBackend(answers=ANSWER, info=on_grid, tokens_per_step=3)
    settings = PRESETS["fast-dllm-v2"].with_overrides(
        {"sub_block_size": 4, "drafts": drafts, **pipelined}  # type: ignore[typeddict-item]
    )
    async with engine_over(backend) as engine:
        sessions = [engine.generate("x" * size, settings) for size in (1, 8, 13)]
        assert [(await session.result()).text for session in sessions] == [ANSWER] * 3
