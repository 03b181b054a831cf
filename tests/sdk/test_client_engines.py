"""What a program can rely on whether its engine is local or remote: the same tests over both."""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import MappingProxyType
from typing import Protocol

import pytest

from d2f_runtime.backends.scripted import ScriptedBackend, StepGate
from d2f_runtime.engine.local import LocalEngine
from d2f_stream.core.errors import EngineClosed, EngineFailed, InvalidRequest
from d2f_stream.core.events import Block, Draft, StreamFinished, StreamStarted
from d2f_stream.core.params import ParamOverrides
from d2f_stream.core.session import Engine, Prompt
from d2f_stream.wire.codec import JSON, MSGPACK
from fakes import ANSWER, engine_over, params, texts, turn
from memory_network import connected, until

LONG = "a" * 4000


class Open(Protocol):
    def __call__(self, backend: ScriptedBackend) -> AbstractAsyncContextManager[Engine]: ...


@asynccontextmanager
async def locally(backend: ScriptedBackend) -> AsyncIterator[LocalEngine]:
    async with engine_over(backend) as engine:
        yield engine


def over_json(backend: ScriptedBackend) -> AbstractAsyncContextManager[Engine]:
    return connected(backend, codec=JSON)


def over_msgpack(backend: ScriptedBackend) -> AbstractAsyncContextManager[Engine]:
    return connected(backend, codec=MSGPACK, capacity=1)


@pytest.fixture(params=[locally, over_json, over_msgpack])
def open_engine(request: pytest.FixtureRequest) -> Open:
    chosen: Open = request.param
    return chosen


async def until_idle(backend: ScriptedBackend) -> None:
    """Wait until the engine has closed every slot; hangs, and so fails, if it never does."""
    await until(lambda: backend.num_opened and not backend.open_slots)


async def test_blocks_concatenate_to_the_answer(open_engine: Open) -> None:
    async with open_engine(ScriptedBackend(ANSWER)) as engine:
        session = engine.generate("hi")
        assert "".join([block.text async for block in session]) == ANSWER
        result = await session.result()
    assert (result.text, result.reason) == (ANSWER, "eos")
    assert result.usage.prompt_tokens == 2


async def test_model_is_described(open_engine: Open) -> None:
    async with open_engine(ScriptedBackend()) as engine:
        info = engine.info
        assert (info.name, info.family, info.native_block_size) == ("scripted", "scripted", 8)
        assert (info.max_block_size, info.max_len, info.description) == (64, 4096, "")
        assert engine.defaults == params()


async def test_events_begin_with_the_start_and_end_with_the_end(open_engine: Open) -> None:
    async with open_engine(ScriptedBackend("hello")) as engine:
        events = [event async for event in engine.generate("hi").events()]
    started, block, finished = events
    assert isinstance(started, StreamStarted)
    assert isinstance(block, Block)
    assert isinstance(finished, StreamFinished)
    assert {started.stream} == {block.stream} == {finished.stream}
    assert [started.seq, block.seq, finished.seq] == [0, 1, 2]


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("hi", "one"),
        ([104, 105], "one"),
        ((104, 105), "one"),
        ([{"role": "user", "content": "hi"}], "two"),
        ([MappingProxyType({"role": "user", "content": "hi"})], "two"),
    ],
)
async def test_prompt_of_every_kind_is_taken(
    open_engine: Open, prompt: Prompt, answer: str
) -> None:
    answers = {"hi": "one", "user: hi\nassistant: ": "two"}
    async with open_engine(ScriptedBackend(answers)) as engine:
        assert (await engine.generate(prompt).result()).text == answer


async def test_defaults_params_and_overrides(open_engine: Open) -> None:
    async with open_engine(ScriptedBackend("hello there")) as engine:
        assert await texts(engine.generate("hi")) == ["hello th", "ere"]
        assert await texts(engine.generate("hi", max_new_tokens=4)) == ["hell"]
        chosen = params(block_size=4, max_new_tokens=10)
        assert await texts(engine.generate("hi", chosen)) == ["hell", "o th", "er"]
        assert await texts(engine.generate("hi", chosen, max_new_tokens=6)) == ["hell", "o "]
        assert await texts(engine.generate("hi", stop=("lo",))) == ["hel"]


async def test_drafts_come_where_asked_for(open_engine: Open) -> None:
    async with open_engine(ScriptedBackend(ANSWER, tokens_per_step=2)) as engine:
        plain = [event async for event in engine.generate("hi").events()]
        drafted = [event async for event in engine.generate("hi", drafts=True).events()]
    assert not any(isinstance(event, Draft) for event in plain)
    assert any(isinstance(event, Draft) for event in drafted)
    final: set[int] = set()
    for event in drafted:
        if isinstance(event, Block):
            final.add(event.index)
        elif isinstance(event, Draft):
            assert event.index not in final


@pytest.mark.parametrize(
    ("prompt", "overrides"),
    [("", {}), ("x" * 5000, {}), ("hi", {"block_size": 100}), ("hi", {"temperature": -1.0})],
)
async def test_bad_request_is_refused_alone(
    open_engine: Open, prompt: str, overrides: ParamOverrides
) -> None:
    async with open_engine(ScriptedBackend(ANSWER)) as engine:
        good = engine.generate("hi")
        with pytest.raises(InvalidRequest):
            await engine.generate(prompt, **overrides).result()
        assert (await good.result()).text == ANSWER


async def test_unknown_parameter_and_prompt_are_refused_at_once(open_engine: Open) -> None:
    async with open_engine(ScriptedBackend(ANSWER)) as engine:
        with pytest.raises(InvalidRequest, match="colour"):
            engine.generate("hi", colour="blue")  # type: ignore[call-arg]
        with pytest.raises(InvalidRequest, match="prompt"):
            engine.generate(5)  # type: ignore[arg-type]


async def test_cancel_ends_with_what_was_committed(open_engine: Open) -> None:
    backend = ScriptedBackend(LONG)
    async with open_engine(backend) as engine:
        session = engine.generate("hi", max_new_tokens=4000)
        first = await anext(session)
        session.cancel()
        session.cancel()
        rest = await texts(session)
        result = await session.result()
        assert backend.open_slots == {}
    assert result.reason == "cancelled"
    assert result.text == first.text + "".join(rest)
    assert len(result.text) == len(result.token_ids) < 4000


async def test_leaving_a_session_waits_until_its_slot_is_free(open_engine: Open) -> None:
    backend = ScriptedBackend(LONG)
    async with open_engine(backend) as engine:
        async with engine.generate("hi", max_new_tokens=4000) as session:
            await anext(session)
        assert backend.open_slots == {}
        assert (await session.result()).reason == "cancelled"


async def test_cancel_before_anything_ran(open_engine: Open) -> None:
    async with open_engine(ScriptedBackend(LONG)) as engine:
        session = engine.generate("hi")
        session.cancel()
        assert ((await session.result()).reason, session.text) == ("cancelled", "")


async def test_break_frees_the_slot(open_engine: Open) -> None:
    backend = ScriptedBackend(LONG)
    async with open_engine(backend) as engine:
        async for _ in engine.generate("hi", max_new_tokens=4000):
            break
        await until_idle(backend)
        assert backend.num_steps < 1000


async def test_dropped_session_frees_the_slot(open_engine: Open) -> None:
    backend = ScriptedBackend(LONG)
    async with open_engine(backend) as engine:
        session = engine.generate("hi", max_new_tokens=4000)
        await anext(session)
        del session
        gc.collect()
        await until_idle(backend)


async def test_cancelled_reader_frees_the_slot(open_engine: Open) -> None:
    gate = StepGate()
    backend = ScriptedBackend(LONG, gate=gate)
    async with open_engine(backend) as engine:

        async def read() -> None:
            async for _ in engine.generate("hi", max_new_tokens=4000):
                pass

        reading = asyncio.create_task(read())
        await asyncio.to_thread(gate.wait_entered)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        gate.open()
        await until_idle(backend)


async def test_several_sessions_go_on_side_by_side(open_engine: Open) -> None:
    answers = {f"prompt {number}": f"{number} " * (5 + number) for number in range(8)}
    async with open_engine(ScriptedBackend(answers)) as engine:
        sessions = {prompt: engine.generate(prompt) for prompt in answers}
        results = await asyncio.gather(*(session.result() for session in sessions.values()))
    assert [result.text for result in results] == list(answers.values())


async def test_unread_session_holds_nothing_up(open_engine: Open) -> None:
    async with open_engine(ScriptedBackend(LONG)) as engine:
        unread = engine.generate("hi", max_new_tokens=2000)
        assert len((await engine.generate("hi", max_new_tokens=1000).result()).text) == 1000
        assert len("".join(await texts(unread))) == 2000


async def test_failing_backend_ends_the_session_after_its_blocks(open_engine: Open) -> None:
    backend = ScriptedBackend(LONG, errors={4: RuntimeError("the device is gone")})
    async with open_engine(backend) as engine:
        session = engine.generate("hi")
        assert [(await anext(session)).text for _ in range(2)] == ["a" * 8] * 2
        with pytest.raises(EngineFailed, match="the device is gone"):
            await anext(session)


async def test_engine_closed_in_mid_stream_ends_its_sessions(open_engine: Open) -> None:
    backend = ScriptedBackend(LONG)
    async with open_engine(backend) as engine:
        session = engine.generate("hi", max_new_tokens=4000)
        await anext(session)
    with pytest.raises(EngineClosed):
        await texts(session)
    with pytest.raises(EngineClosed):
        engine.generate("hi")
    assert backend.open_slots == {}


async def test_engine_closed_while_a_task_reads(open_engine: Open) -> None:
    gate = StepGate()
    async with open_engine(ScriptedBackend(LONG, gate=gate)) as engine:
        reading = asyncio.create_task(texts(engine.generate("hi")))
        await asyncio.to_thread(gate.wait_entered)
        gate.let_through(1)
    with pytest.raises(EngineClosed):
        await reading


def test_one_event_loop_after_the_other(open_engine: Open) -> None:
    async def ask() -> str:
        async with open_engine(ScriptedBackend(ANSWER)) as engine:
            return (await engine.generate("hi").result()).text

    assert [asyncio.run(ask()) for _ in range(2)] == [ANSWER] * 2


def test_engine_belongs_to_one_event_loop(open_engine: Open) -> None:
    async def make() -> Engine:
        async with open_engine(ScriptedBackend(ANSWER)) as engine:
            return engine

    engine = asyncio.run(make())

    async def use() -> None:
        engine.generate("hi")

    with pytest.raises(RuntimeError, match="another event loop"):
        asyncio.run(use())


async def test_request_may_come_in_the_same_turn_as_many_cancels(open_engine: Open) -> None:
    backend = ScriptedBackend(ANSWER)
    async with open_engine(backend) as engine:
        given_up = [engine.generate("hi") for _ in range(20)]
        kept = engine.generate("hi")
        await turn()
        for session in given_up:
            session.cancel()
        reasons = {(await session.result()).reason for session in given_up}
        assert reasons <= {"cancelled", "eos"}
        assert (await kept.result()).text == ANSWER
