"""Engines and event loops: several loops over one model, and loops that end too early."""

import asyncio
import threading

import pytest

from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend, StepGate
from d2f_runtime.engine.local import LocalEngine
from d2f_runtime.loaded_model import MODELS, ModelParts
from d2f_stream.core.errors import EngineClosed
from d2f_stream.core.session import Session
from fakes import ANSWER, check_clean, engine_over, params, texts, turn

LONG = "a" * 4000


def parts_of(backend: ScriptedBackend) -> ModelParts:
    return ModelParts(backend, ByteCodec(), params(max_new_tokens=2000))


def test_two_event_loops_in_a_row_share_one_loaded_model() -> None:
    backend = ScriptedBackend(ANSWER)
    num_loads = 0

    def load() -> ModelParts:
        nonlocal num_loads
        num_loads += 1
        return parts_of(backend)

    model = MODELS.lease(None, "shared", load)

    async def ask() -> str:
        return (await LocalEngine(model).generate("hi").result()).text

    assert asyncio.run(ask()) == ANSWER
    assert asyncio.run(ask()) == ANSWER
    assert num_loads == 1
    assert backend.open_slots == {}

    async def close() -> None:
        await LocalEngine(model).close()

    asyncio.run(close())
    assert backend.closed


def test_two_event_loops_in_two_threads_share_one_loaded_model() -> None:
    backend = ScriptedBackend(ANSWER)
    model = MODELS.lease(None, "shared", lambda: parts_of(backend))
    answers: list[str] = []

    async def ask() -> None:
        engine = LocalEngine(model)
        sessions = [engine.generate("hi") for _ in range(5)]
        answers.extend([(await session.result()).text for session in sessions])

    threads = [threading.Thread(target=asyncio.run, args=(ask(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [ANSWER] * 15
    asyncio.run(LocalEngine(model).close())
    check_clean(backend)


def test_engine_belongs_to_one_event_loop() -> None:
    async def make() -> LocalEngine:
        engine = LocalEngine.over(ScriptedBackend(), ByteCodec())
        async with engine:
            return engine

    async def use(engine: LocalEngine) -> None:
        engine.generate("hi")

    with pytest.raises(RuntimeError, match="another event loop"):
        asyncio.run(use(asyncio.run(make())))


@pytest.mark.parametrize("num_read", [0, 1, 5])
def test_event_loop_may_end_amid_a_session(num_read: int) -> None:
    backend = ScriptedBackend(LONG)
    model = MODELS.lease(None, "left", lambda: parts_of(backend))
    left: list[Session] = []

    async def leave() -> None:
        session = LocalEngine(model).generate("hi")
        for _ in range(num_read):
            await anext(session)
        left.append(session)

    asyncio.run(leave())
    assert backend.open_slots == {}

    async def read() -> None:
        await texts(left[0])

    with pytest.raises(EngineClosed):
        asyncio.run(read())
    asyncio.run(LocalEngine(model).close())
    check_clean(backend)


def test_event_loop_that_ends_in_mid_step_waits_for_the_step() -> None:
    gate = StepGate()
    backend = ScriptedBackend(LONG, gate=gate)
    model = MODELS.lease(None, "left", lambda: parts_of(backend))

    async def leave() -> None:
        session = LocalEngine(model).generate("hi")
        await asyncio.to_thread(gate.wait_entered)
        asyncio.get_running_loop().call_later(0.05, gate.open)  # while the tasks are cancelled
        session.cancel()

    asyncio.run(leave())
    assert backend.open_slots == {}
    asyncio.run(LocalEngine(model).close())
    check_clean(backend)


async def test_step_task_cancelled_from_outside_ends_its_sessions_and_stays_cancelled() -> None:
    gate = StepGate()
    backend = ScriptedBackend(LONG, gate=gate)
    async with engine_over(backend) as engine:
        session = engine.generate("hi")
        await asyncio.to_thread(gate.wait_entered)
        task = next(task for task in asyncio.all_tasks() if task.get_name().startswith("d2f-steps"))
        task.cancel()
        await turn()
        task.cancel()  # a second time, while it waits for the device thread
        await turn()
        assert not task.done()
        gate.open()
        await asyncio.wait([task])
        assert task.cancelled()
        assert backend.open_slots == {}
        with pytest.raises(EngineClosed, match="shut down"):
            await session.result()
        assert (await engine.generate("hi", max_new_tokens=8).result()).text == "a" * 8


async def test_task_cancelled_while_it_opens_a_slot_leaks_none() -> None:
    entered, go_on = threading.Event(), threading.Event()

    class SlowToOpen(ScriptedBackend):
        __slots__ = ()

        def open_slot(self, capacity: int, *, prefix: object = None) -> object:  # type: ignore[override]
            entered.set()
            go_on.wait()
            return ScriptedBackend.open_slot(self, capacity)

    backend = SlowToOpen(LONG)
    async with engine_over(backend) as engine:
        session = engine.generate("hi")
        await asyncio.to_thread(entered.wait)
        task = next(task for task in asyncio.all_tasks() if task.get_name().startswith("d2f-steps"))
        task.cancel()
        await turn()
        go_on.set()
        await asyncio.wait([task])
        with pytest.raises(EngineClosed):
            await session.result()
    assert backend.num_opened == 1
