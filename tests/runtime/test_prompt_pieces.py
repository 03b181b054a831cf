"""Prompts that are worked off in pieces: the same answers, and nobody waits long for a step."""

import asyncio
from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend
from d2f_runtime.engine.local import LocalEngine
from d2f_runtime.engine.prompt_cuts import PromptCuts
from d2f_runtime.loaded_model import LoadedModel, ModelParts
from d2f_stream.core.limits import Limits
from d2f_stream.core.params import GenerationParams
from fakes import check_clean, info

ATTENTIONS = ("causal", "grid", "prompt_grid", "full")
UNDIVIDED = 1 << 20


@given(
    attention=st.sampled_from(ATTENTIONS),
    size=st.integers(1, 40),
    length=st.integers(1, 300),
    limits=st.lists(st.integers(1, 90), min_size=1),
)
def test_pieces_are_whole_attention_blocks_and_make_up_the_prompt(
    attention: str, size: int, length: int, limits: Sequence[int]
) -> None:
    cuts = PromptCuts.of(length, info(prompt_attention=attention, native_block_size=size))
    first = {"grid": size, "prompt_grid": length % size or size, "causal": 1}.get(attention, length)
    step = 1 if attention == "causal" else size
    edges = [*range(first, length, step)] if attention != "full" else []
    start = number = 0
    while True:
        limit = limits[number % len(limits)]
        piece = cuts.piece(start, limit)
        stop = start + piece.num_tokens
        within = [edge for edge in edges if start < edge <= start + limit]
        ahead = [edge for edge in edges if edge > start]
        if piece.is_last:
            assert stop == length
            assert length - start <= limit or not within
            return
        assert stop == (within or ahead[:1])[-1]
        assert cuts.stops(start, stop) == tuple(e for e in edges if start < e <= stop)
        start, number = stop, number + 1


async def ask_all(
    limits: Limits,
    backend: ScriptedBackend,
    asked: Sequence[tuple[str, GenerationParams]],
    *,
    cancelled: int | None,
    keeps: bool,
) -> list[Any]:
    """Ask everything at once, and the first once more at the end; cancel one on the way."""
    parts = ModelParts(backend, ByteCodec(), GenerationParams())
    model = LoadedModel("scripted", lambda: parts, keeps_prefixes=keeps)
    async with LocalEngine(model, limits=limits) as engine:
        sessions = [engine.generate(prompt, params) for prompt, params in asked]
        if cancelled is not None:
            await anext(engine.generate("x", max_new_tokens=4))
            sessions[cancelled].cancel()
        sessions.append(engine.generate(*asked[0]))
        found = []
        for number, session in enumerate(sessions):
            result = await session.result()
            same = None if number == cancelled else (result.token_ids, result.usage)
            found.append((same, [block.start async for block in session] if same else None))
        await asyncio.sleep(0)
        assert engine.current_load.prompt_tokens == 0
    model.device.stop(last=model.do_close)
    model.device.join(10.0)
    return found


@settings(max_examples=80)
@given(
    asked=st.lists(
        st.tuples(
            st.text("ab", min_size=1, max_size=150),
            st.builds(
                GenerationParams,
                max_new_tokens=st.integers(1, 40),
                block_size=st.sampled_from([1, 4, 8]),
                max_active_blocks=st.sampled_from([1, 3]),
                temperature=st.sampled_from([0.0, 0.7]),
                seed=st.just(5),
            ),
        ),
        min_size=1,
        max_size=5,
    ),
    attention=st.sampled_from(ATTENTIONS),
    max_step_tokens=st.sampled_from([1, 24, 80]),
    keeps=st.booleans(),
    cancelled=st.none() | st.integers(0, 4),
)
def test_answers_do_not_depend_on_the_pieces(
    asked: list[tuple[str, GenerationParams]],
    attention: str,
    max_step_tokens: int,
    keeps: bool,
    cancelled: int | None,
) -> None:
    def answer(prompt: tuple[int, ...]) -> Sequence[int]:
        return [65 + sum(prompt[:n]) % 26 for n in range(1, len(prompt) + 1)]

    def confidence(position: int, step: int) -> float:
        return ((position * 7919 + step * 104729) % 16) / 15

    outcomes = []
    for most in (UNDIVIDED, max_step_tokens):
        backend = ScriptedBackend(
            answer, info=info(prompt_attention=attention), confidence=confidence
        )
        limits = Limits(max_step_tokens=most)
        gone = cancelled if cancelled is not None and cancelled < len(asked) else None
        ask = ask_all(limits, backend, asked, cancelled=gone, keeps=keeps)
        outcomes.append(asyncio.run(ask))
        if not keeps:
            check_clean(backend)
    assert outcomes[0] == outcomes[1]


async def test_long_prompt_is_cut_and_others_go_on_meanwhile() -> None:
    backend = ScriptedBackend("word " * 40, info=info(prompt_attention="causal"))
    engine = LocalEngine.over(backend, ByteCodec(), limits=Limits(max_step_tokens=64))
    async with engine:
        short = engine.generate("short", max_new_tokens=160, block_size=4, max_active_blocks=1)
        await anext(short)
        long = engine.generate("long " * 200, max_new_tokens=8, block_size=4)
        await asyncio.gather(long.result(), short.result())
    check_clean(backend)
    steps = [[len(row.window.tokens) for row in batch] for batch in backend.batches]
    assert max(map(sum, steps)) <= 64 + 8  # a window's rows are known from the one before it
    beside = [step for step in steps if len(step) == 2]
    assert len(beside) > 1000 // 64, "the short request has a window in every step of the prompt"
