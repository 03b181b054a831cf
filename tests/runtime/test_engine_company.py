"""An answer is its request's alone: the same beside no other session and beside a dozen."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import d2f_stream
from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend
from d2f_runtime.engine.local import LocalEngine
from d2f_stream.core.events import Event
from d2f_stream.core.limits import Limits
from d2f_stream.core.params import GenerationParams
from d2f_stream.core.presets import PRESETS
from d2f_stream.core.session import Engine
from fakes import check_clean, engine_over

PROMPT = "Ben has 34 books. He buys 18 more books. How many books does he have now?"
OTHERS = GenerationParams(block_size=8, max_new_tokens=96, add_threshold=0.1)
ASKED = st.builds(
    GenerationParams,
    max_new_tokens=st.integers(1, 120),
    block_size=st.sampled_from([4, 8, 16]),
    add_threshold=st.sampled_from([0.1, 0.5, 1.0]),
    activate_threshold=st.sampled_from([0.1, 0.95]),
    max_active_blocks=st.sampled_from([None, 1, 3, 4]),
    temperature=st.sampled_from([0.0, 0.8]),
    seed=st.just(-7),
    stop_at_eos=st.sampled_from(["truncate", "drain"]),
)


def timeless(events: Sequence[Event]) -> list[dict[str, object]]:
    """The events without what names a stream and what a clock says."""
    fields = [msgspec.structs.asdict(event) for event in events]
    named = ("stream", "request_id", "elapsed_ms", "timings")
    return [{k: v for k, v in each.items() if k not in named} for each in fields]


async def answer_beside(
    engine: Engine, asked: GenerationParams | None, others: Sequence[GenerationParams]
) -> list[dict[str, object]]:
    """Ask while others run: half of these before the request, half of them after it."""
    half = len(others) // 2
    company = [engine.generate(f"other {i}", each) for i, each in enumerate(others[:half])]
    if company:
        await anext(company[0])
    session = engine.generate(PROMPT, asked)
    company += [engine.generate(f"later {i}", each) for i, each in enumerate(others[half:])]
    events = [event async for event in session.events()]
    for other in company:
        other.cancel()
    return timeless(events)


def ask_scripted(asked: GenerationParams, num_others: int, limits: Limits) -> object:
    def confidence(position: int, step: int) -> float:
        return ((position * 7919 + step * 104729) % 16) / 15

    backend = ScriptedBackend("blocks, whole ones, and " * 5, confidence=confidence)
    others = [OTHERS.with_overrides({"may_narrow": i % 3 == 0}) for i in range(num_others)]

    async def ask() -> object:
        async with LocalEngine.over(backend, ByteCodec(), limits=limits) as engine:
            return await answer_beside(engine, asked, others)

    events = asyncio.run(ask())
    check_clean(backend)
    return events


@settings(max_examples=60)
@given(
    asked=ASKED,
    max_rows=st.sampled_from([1, 3, 16]),
    max_step_tokens=st.sampled_from([16, 128, 1024]),
    num_others=st.integers(1, 12),
)
def test_events_do_not_depend_on_other_sessions(
    asked: GenerationParams, max_rows: int, max_step_tokens: int, num_others: int
) -> None:
    limits = Limits(max_rows=max_rows, max_step_tokens=max_step_tokens)
    assert ask_scripted(asked, num_others, limits) == ask_scripted(asked, 0, limits)


def test_an_answer_that_may_narrow_depends_on_them() -> None:
    asked = OTHERS.with_overrides({"may_narrow": True})
    limits = Limits(max_step_tokens=128)
    assert ask_scripted(asked, 12, limits) != ask_scripted(asked, 0, limits)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_no_preset_narrows(name: str) -> None:
    assert not PRESETS[name].may_narrow


async def test_engine_s_limits_decide_for_requests_that_do_not_say() -> None:
    backend = ScriptedBackend("hello")
    limits = Limits(may_narrow=True)
    async with LocalEngine.over(backend, ByteCodec(), limits=limits) as engine:
        assert engine.defaults.may_narrow
    async with LocalEngine.over(ScriptedBackend("hello"), ByteCodec()) as engine:
        assert not engine.defaults.may_narrow


@pytest.mark.parametrize(("max_rows", "together"), [(None, 5), (3, 3), (9, 9)])
async def test_as_many_share_a_step_as_the_model_is_made_for(
    max_rows: int | None, together: int
) -> None:
    backend = ScriptedBackend("hello", capacity=10_000)
    backend.info = replace(backend.info, step_sessions=5)
    async with engine_over(backend, limits=Limits(max_rows=max_rows)) as engine:
        await asyncio.gather(*(engine.generate("hi").result() for _ in range(20)))
        assert max(map(len, backend.batches)) == together


@pytest.mark.parametrize("active", [1, 4, None])
async def test_embedded_model_answers_the_same_beside_a_dozen_others(active: int | None) -> None:
    async with d2f_stream.load(limits=Limits(max_step_tokens=512)) as engine:
        asked = engine.defaults.with_overrides({"max_active_blocks": active, "add_threshold": 0.1})
        alone = await answer_beside(engine, asked, [])
        crowded = await answer_beside(engine, asked, [asked] * 12)
    assert crowded == alone
    assert "The answer is 52" in "".join(str(event.get("text", "")) for event in alone)


@pytest.mark.parametrize(
    "field",
    ["max_sessions", "max_tokens", "max_rows", "max_step_tokens", "max_prompt_tokens"],
)
def test_limits_are_positive(field: str) -> None:
    zero: dict[str, Any] = {field: 0}
    with pytest.raises(d2f_stream.InvalidParams, match=f"{field} is 0 but must be an integer"):
        Limits(**zero)
