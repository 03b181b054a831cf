import asyncio
import gc
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend, StepGate
from d2f_runtime.engine.local import LocalEngine
from d2f_runtime.loaded_model import MODELS, ModelKey, ModelParts
from d2f_stream.core.errors import EngineClosed, EngineFailed, InvalidPrompt
from fakes import check_clean, engine_over, params, texts, turn

LONG = "a" * 4000


def engine_of(load: Callable[[], ModelParts], *, key: ModelKey | None = None) -> LocalEngine:
    return LocalEngine(MODELS.lease(key, "test", load))


def parts_of(backend: ScriptedBackend) -> ModelParts:
    return ModelParts(backend, ByteCodec(), params(max_new_tokens=2000))


async def next_step(gate: StepGate, backend: ScriptedBackend) -> None:
    """Let the step in flight end, and wait until the engine runs the one after it."""
    gate.let_through()
    await asyncio.to_thread(gate.wait_entered, backend.num_steps + 1)


async def slot_is_free_within_one_step(
    engine: LocalEngine, backend: ScriptedBackend, gate: StepGate
) -> None:
    """With a step in flight for the slot 0 that was given up: the next step runs without it."""
    other = engine.generate("other")
    await next_step(gate, backend)
    assert list(backend.open_slots) == [1]
    assert [row.slot for row in backend.batches[-1]] == [1]
    gate.open()
    other.cancel()


async def test_break_frees_the_slot_within_one_step() -> None:
    gate = StepGate()
    backend = ScriptedBackend(LONG, gate=gate)
    async with engine_over(backend) as engine:
        gate.let_through(2)  # a block of 8, 4 per step
        async for _ in engine.generate("hi"):
            await asyncio.to_thread(gate.wait_entered, 3)
            break
        await slot_is_free_within_one_step(engine, backend, gate)


async def test_cancelled_consumer_frees_the_slot_within_one_step() -> None:
    gate = StepGate()
    backend = ScriptedBackend(LONG, gate=gate)
    async with engine_over(backend) as engine:

        async def consume() -> None:
            async for _ in engine.generate("hi"):
                pass

        consumer = asyncio.create_task(consume())
        await asyncio.to_thread(gate.wait_entered)
        consumer.cancel()
        await asyncio.wait([consumer])
        await slot_is_free_within_one_step(engine, backend, gate)
        assert consumer.cancelled()


async def test_cancelled_consumer_that_named_its_session_frees_the_slot_once_let_go() -> None:
    gate = StepGate()
    backend = ScriptedBackend(LONG, gate=gate)
    async with engine_over(backend) as engine:
        consumer = asyncio.create_task(texts(engine.generate("hi")))
        await asyncio.to_thread(gate.wait_entered)
        consumer.cancel()
        await asyncio.wait([consumer])
        del consumer  # with the traceback whose frames hold the session
        await slot_is_free_within_one_step(engine, backend, gate)


async def test_cancelled_consumer_in_a_context_frees_the_slot_within_one_step() -> None:
    gate = StepGate()
    backend = ScriptedBackend(LONG, gate=gate)
    async with engine_over(backend) as engine:

        async def consume() -> None:
            async with engine.generate("hi") as session:
                async for _ in session:
                    pass

        consumer = asyncio.create_task(consume())
        await asyncio.to_thread(gate.wait_entered)
        consumer.cancel()
        await turn()
        assert not consumer.done()  # it waits until the slot is free
        await slot_is_free_within_one_step(engine, backend, gate)
        await asyncio.wait([consumer])
        assert consumer.cancelled()


async def test_collected_session_frees_the_slot_within_one_step() -> None:
    gate = StepGate()
    backend = ScriptedBackend(LONG, gate=gate)
    async with engine_over(backend) as engine:
        cycle: list[object] = [engine.generate("hi")]
        cycle.append(cycle)
        await asyncio.to_thread(gate.wait_entered)
        del cycle
        gc.collect()
        await slot_is_free_within_one_step(engine, backend, gate)


async def test_cancel_in_mid_step_frees_the_slot_within_one_step() -> None:
    gate = StepGate()
    backend = ScriptedBackend(LONG, gate=gate)
    async with engine_over(backend) as engine:
        session = engine.generate("hi")
        await asyncio.to_thread(gate.wait_entered)
        session.cancel()
        session.cancel()
        assert list(backend.open_slots) == [0]  # the device thread still writes to it
        await slot_is_free_within_one_step(engine, backend, gate)
        result = await session.result()
    assert (result.reason, result.text, result.usage.steps) == ("cancelled", "", 0)


async def test_leaving_the_session_s_context_means_that_its_slot_is_free() -> None:
    backend = ScriptedBackend(LONG)
    async with engine_over(backend) as engine:
        async with engine.generate("hi") as session:
            await anext(session)
            assert list(backend.open_slots) == [0]
        assert backend.open_slots == {}


async def test_cancelled_session_keeps_what_was_committed() -> None:
    backend = ScriptedBackend(LONG)
    async with engine_over(backend) as engine:
        session = engine.generate("hi")
        first = await anext(session)
        session.cancel()
        rest = await texts(session)
        result = await session.result()
    assert result.reason == "cancelled"
    assert result.text == first.text + "".join(rest)


async def test_held_session_stops_at_the_high_mark_until_the_engine_closes() -> None:
    backend = ScriptedBackend(LONG)
    async with engine_over(backend) as engine:
        session = engine.generate("hi", max_new_tokens=2000)
        async for _ in session:
            break
        other = await engine.generate("hi", max_new_tokens=1000).result()
        assert len(other.text) == 1000
        assert list(backend.open_slots) == [0]
        assert len(session.text) == 8 * 18  # one read, sixteen waiting, one above the mark
    assert len(session.text) == 8 * 18
    with pytest.raises(EngineClosed):
        await texts(session)


async def test_closing_waits_for_the_step_in_flight() -> None:
    gate = StepGate()
    backend = ScriptedBackend(LONG, gate=gate)
    engine = LocalEngine.over(backend, ByteCodec())
    session = engine.generate("hi")
    await asyncio.to_thread(gate.wait_entered)
    closing = asyncio.create_task(engine.close())
    await turn()
    assert not closing.done()
    assert list(backend.open_slots) == [0]
    gate.open()
    await closing
    check_clean(backend)
    with pytest.raises(EngineClosed, match="closed"):
        await session.result()


async def test_cancelled_close_goes_on_closing() -> None:
    gate = StepGate()
    backend = ScriptedBackend(LONG, gate=gate)
    engine = LocalEngine.over(backend, ByteCodec())
    session = engine.generate("hi")
    await asyncio.to_thread(gate.wait_entered)
    closing = asyncio.create_task(engine.close())
    await turn()
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    gate.open()
    await engine.close()
    check_clean(backend)
    del session


async def test_closing_twice_and_closing_unused_is_fine() -> None:
    backend = ScriptedBackend()
    engine = LocalEngine.over(backend, ByteCodec())
    await engine.close()
    await engine.close()
    with pytest.raises(EngineClosed):
        engine.generate("hi")


async def test_closing_ends_queued_sessions_too() -> None:
    gate = StepGate()
    backend = ScriptedBackend(LONG, gate=gate, capacity=3000)
    async with engine_over(backend) as engine:
        running = engine.generate("hi", max_new_tokens=2000)
        queued = engine.generate("hi", max_new_tokens=2000)
        await asyncio.to_thread(gate.wait_entered)
        gate.open()
    for session in (running, queued):
        with pytest.raises(EngineClosed):
            await session.result()


async def test_request_may_come_before_the_model_is_loaded() -> None:
    loaded = threading.Event()
    backend = ScriptedBackend("hello")

    def load() -> ModelParts:
        loaded.wait()
        return parts_of(backend)

    engine = engine_of(load)
    session = engine.generate("hi")
    bad = engine.generate("")
    loaded.set()
    assert (await session.result()).text == "hello"
    with pytest.raises(InvalidPrompt):
        await anext(bad)
    await engine.close()
    check_clean(backend)


async def test_request_may_be_given_up_while_the_model_loads() -> None:
    loaded = threading.Event()
    backend = ScriptedBackend("hello")

    def load() -> ModelParts:
        loaded.wait()
        return parts_of(backend)

    engine = engine_of(load)
    async with engine.generate("hi") as session:
        pass
    result = await session.result()
    assert (result.reason, result.text) == ("cancelled", "")
    loaded.set()
    await engine.close()
    assert backend.num_opened == 0


async def test_engine_may_be_closed_while_the_model_loads() -> None:
    loaded = threading.Event()
    backend = ScriptedBackend("hello")

    def load() -> ModelParts:
        loaded.wait()
        return parts_of(backend)

    engine = engine_of(load)
    session = engine.generate("hi")
    await turn()
    engine.shut()
    with pytest.raises(EngineClosed):
        await session.result()
    loaded.set()
    await engine.close()
    assert backend.closed


async def test_idle_engine_has_no_task() -> None:
    backend = ScriptedBackend("hello")
    async with engine_over(backend) as engine:
        await engine.generate("hi").result()
        await turn()
        assert not [t for t in asyncio.all_tasks() if t.get_name().startswith("d2f-steps")]


async def test_model_is_freed_when_its_last_engine_closes() -> None:
    backend = ScriptedBackend("hello")
    key = ModelKey(path=Path("/nowhere"), backend="x", device="x", quantization="x")
    first = engine_of(lambda: parts_of(backend), key=key)
    second = engine_of(lambda: pytest.fail("loaded twice"), key=key)
    async with first:
        async with second:
            assert (await second.generate("hi").result()).text == "hello"
        assert not backend.closed
        assert (await first.generate("hi").result()).text == "hello"
    assert backend.closed


async def test_an_engine_is_entered_warm_where_that_is_asked_for() -> None:
    warm, cold = ScriptedBackend("hi"), ScriptedBackend("hi")
    async with LocalEngine.over(warm, ByteCodec(), warm_up=True):
        assert (warm.num_warm_ups, warm.num_steps) == (1, 0)
    async with LocalEngine.over(cold, ByteCodec()):
        pass
    assert cold.num_warm_ups == 0
    assert threading.current_thread().name not in warm.threads


async def test_a_model_that_cannot_be_warmed_up_is_closed() -> None:
    class Cold(ScriptedBackend):
        def warm_up(self) -> None:
            raise MemoryError("no room for graphs")

    backend = Cold("hi")
    with pytest.raises(EngineFailed, match="cannot be warmed up: MemoryError"):
        async with LocalEngine.over(backend, ByteCodec(), warm_up=True):
            pass
    assert backend.closed
