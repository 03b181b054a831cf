"""Event loops closed without a word: nobody waits for them."""

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator

import pytest

from d2f_runtime.backends.base import Slot
from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend, StepGate
from d2f_runtime.engine.local import LocalEngine
from d2f_runtime.loaded_model import MODELS, LoadedModel, ModelParts
from d2f_stream.core.errors import EngineClosed, OutOfCapacity
from d2f_stream.core.session import Session
from fakes import check_clean, params, texts

LONG = "a" * 4000
TIMEOUT_S = 20.0
LEFT: list[asyncio.AbstractEventLoop] = []


@pytest.fixture(autouse=True)
def close_what_was_left() -> Iterator[None]:
    yield
    while LEFT:
        LEFT.pop().close()
    gc.collect()  # of the tasks that were pending, which say so


def shared(backend: ScriptedBackend) -> LoadedModel:
    """A model that no engine's end frees; see `free`."""
    parts = ModelParts(backend, ByteCodec(), params(max_new_tokens=2000))
    return MODELS.lease(None, "shared", lambda: parts)


def free(model: LoadedModel, backend: ScriptedBackend) -> None:
    """End the model; nothing may be left of it."""
    asyncio.run(LocalEngine(model).close())
    check_clean(backend)


async def begin(model: LoadedModel) -> Session:
    session = LocalEngine(model).generate("hi")
    await anext(session)
    return session


def abandon(model: LoadedModel) -> Session:
    """Start a session on an event loop that is closed with all that it was doing."""
    loop = asyncio.new_event_loop()
    session = loop.run_until_complete(begin(model))
    loop.close()
    return session


def leave_to_its_thread(model: LoadedModel) -> Session:
    """Start a session on an event loop that nobody closes, of a thread that ends."""
    found: list[Session] = []
    loop = asyncio.new_event_loop()
    LEFT.append(loop)

    def run() -> None:
        found.append(loop.run_until_complete(begin(model)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


async def answer(model: LoadedModel) -> str:
    async with asyncio.timeout(TIMEOUT_S):
        return (await LocalEngine(model).generate("hi", max_new_tokens=8).result()).text


@pytest.mark.parametrize("lose", [abandon, leave_to_its_thread])
@pytest.mark.parametrize("is_held", [True, False])
def test_slot_of_a_lost_loop_is_free_for_the_next(
    lose: Callable[[LoadedModel], Session], is_held: bool
) -> None:
    backend = ScriptedBackend(LONG, capacity=2010)  # room for one of them
    model = shared(backend)
    session: Session | None = lose(model)
    if not is_held:
        session = None
        gc.collect()
    assert asyncio.run(answer(model)) == "a" * 8
    assert backend.open_slots == {}
    free(model, backend)
    del session


@pytest.mark.parametrize("lose", [abandon, leave_to_its_thread])
def test_slot_of_a_lost_loop_is_closed_even_if_nobody_wants_it(
    lose: Callable[[LoadedModel], Session],
) -> None:
    closed = threading.Event()

    class Told(ScriptedBackend):
        __slots__ = ()

        def close_slot(self, slot: Slot) -> None:
            ScriptedBackend.close_slot(self, slot)
            closed.set()

    backend = Told(LONG)
    model = shared(backend)
    session = lose(model)
    assert closed.wait(TIMEOUT_S)
    free(model, backend)
    del session


def test_session_that_is_dropped_after_its_loop_was_closed_frees_its_slot_by_itself() -> None:
    backend = ScriptedBackend(LONG)
    model = shared(backend)
    session = abandon(model)
    assert len(backend.open_slots) == 1
    del session
    gc.collect()
    asyncio.run(flush(model))
    assert backend.open_slots == {}
    free(model, backend)


async def flush(model: LoadedModel) -> None:
    """Wait for what was posted to the device thread before."""
    await model.device.call(lambda: None)


def test_engine_of_a_closed_loop_is_closed_from_another() -> None:
    backend = ScriptedBackend(LONG)
    model = shared(backend)
    engine = LocalEngine(model)

    async def leave() -> Session:
        session = engine.generate("hi")
        await anext(session)
        return session

    loop = asyncio.new_event_loop()
    session = loop.run_until_complete(leave())
    loop.close()

    async def close() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await engine.close()

    asyncio.run(close())
    check_clean(backend)
    del session


def test_one_who_waits_for_room_gets_it_when_the_loop_that_has_it_is_closed() -> None:
    refused = threading.Event()

    class Full(ScriptedBackend):
        __slots__ = ()

        def open_slot(self, capacity: int) -> Slot:
            try:
                return ScriptedBackend.open_slot(self, capacity)
            except OutOfCapacity:
                refused.set()
                raise

    backend = Full(LONG, capacity=2010)
    model = shared(backend)
    loop = asyncio.new_event_loop()
    session = loop.run_until_complete(begin(model))
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(asyncio.run(answer(model))))
    thread.start()
    assert refused.wait(TIMEOUT_S)
    loop.close()
    thread.join(TIMEOUT_S)
    assert answers == ["a" * 8]
    free(model, backend)
    del session


def test_step_that_waits_behind_a_closed_loop_s_end_is_not_run() -> None:
    """Its slot may be gone by then, which would break the model for all others."""
    gate = StepGate()
    backend = ScriptedBackend(LONG, gate=gate)
    model = shared(backend)
    loop = asyncio.new_event_loop()

    async def begin_two_steps() -> Session:
        session = LocalEngine(model).generate("hi")
        await asyncio.to_thread(gate.wait_entered)
        for _ in range(3):
            await asyncio.sleep(0)  # one runs and one is queued
        return session

    session = loop.run_until_complete(begin_two_steps())
    loop.run_until_complete(loop.shutdown_default_executor())
    model.device.post(model.do_reclaim)  # behind the second step
    loop.close()
    gate.open()
    assert asyncio.run(answer(model)) == "a" * 8
    free(model, backend)
    del session


@pytest.mark.parametrize("lose", [abandon, leave_to_its_thread])
def test_reading_on_elsewhere_is_an_error_instead_of_a_wait(
    lose: Callable[[LoadedModel], Session],
) -> None:
    backend = ScriptedBackend(LONG)
    model = shared(backend)
    session = lose(model)

    async def read_on() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await texts(session)

    async def wait_for_result() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await session.result()

    async def leave() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            async with session:
                pass

    kind = EngineClosed if lose is abandon else RuntimeError
    for read in (read_on, wait_for_result):
        with pytest.raises(kind, match="event loop"):
            asyncio.run(read())
    asyncio.run(leave())
    assert asyncio.run(answer(model)) == "a" * 8
    free(model, backend)
