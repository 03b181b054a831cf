import asyncio
import logging
from collections.abc import Sequence

import pytest

from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend, StepGate
from d2f_runtime.engine.local import LocalEngine
from d2f_runtime.loaded_model import MODELS, ModelParts
from d2f_stream.core.errors import (
    D2FError,
    EngineFailed,
    InvalidPrompt,
    ModelDamaged,
    OutOfCapacity,
)
from d2f_stream.core.events import Event, StreamFailed
from d2f_stream.core.session import Session
from fakes import check_clean, engine_over, params, turn


async def last_event(session: Session) -> Event:
    return [event async for event in session.events()][-1]


async def test_error_in_a_step_fails_every_session_and_the_engine() -> None:
    backend = ScriptedBackend("a" * 1000, errors={3: RuntimeError("CUDA error: 700")})
    async with engine_over(backend) as engine:
        sessions = [engine.generate("hi") for _ in range(3)]
        for session in sessions:
            event = await last_event(session)
            assert isinstance(event, StreamFailed)
            assert event.code == "engine_failed"
            with pytest.raises(EngineFailed, match="CUDA error: 700"):
                await session.result()
        assert not engine.usable
        with pytest.raises(EngineFailed, match="CUDA error: 700"):
            engine.generate("hi")


async def test_error_in_a_step_fails_queued_sessions_too() -> None:
    backend = ScriptedBackend("a" * 50, errors={0: RuntimeError("broken")}, capacity=150)
    async with engine_over(backend) as engine:
        running, queued = engine.generate("hi"), engine.generate("hi")
        for session in (running, queued):
            with pytest.raises(EngineFailed, match="broken"):
                await session.result()


async def test_committed_blocks_stay_readable_after_a_failure() -> None:
    backend = ScriptedBackend("a" * 1000, errors={4: RuntimeError("broken")})
    async with engine_over(backend) as engine:
        session = engine.generate("hi")
        assert [(await anext(session)).text for _ in range(2)] == ["a" * 8] * 2
        with pytest.raises(EngineFailed):
            await anext(session)


async def test_failed_step_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    backend = ScriptedBackend("a", errors={0: RuntimeError("broken")})
    async with engine_over(backend) as engine:
        with caplog.at_level(logging.ERROR), pytest.raises(EngineFailed):
            await engine.generate("hi").result()
    assert [record.name for record in caplog.records] == ["d2f_stream.engine"]


@pytest.mark.parametrize("error", [StopIteration(), SystemExit(1)])
async def test_odd_exceptions_of_a_backend_fail_the_engine_only(error: BaseException) -> None:
    backend = ScriptedBackend("a", errors={0: error})
    async with engine_over(backend) as engine:
        with pytest.raises(EngineFailed, match=type(error).__name__):
            await engine.generate("hi").result()


async def test_failure_reaches_other_engines_of_the_same_model() -> None:
    backend = ScriptedBackend("a" * 100, errors={0: RuntimeError("broken")})
    model = MODELS.lease(None, "shared", lambda: ModelParts(backend, ByteCodec(), params()))
    first, second = LocalEngine(model), LocalEngine(model)
    with pytest.raises(EngineFailed, match="broken"):
        await first.generate("hi").result()
    with pytest.raises(EngineFailed, match="broken"):
        await second.generate("hi").result()
    await first.close()


async def test_backend_that_answers_too_few_rows_fails_the_engine() -> None:
    class Short(ScriptedBackend):
        __slots__ = ()

        def step(self, rows: Sequence[object]) -> list[object]:  # type: ignore[override]
            return list(ScriptedBackend.step(self, rows)[1:])  # type: ignore[arg-type]

    async with engine_over(Short("a")) as engine:
        with pytest.raises(EngineFailed, match="answered 1 rows with 0"):
            await engine.generate("hi").result()


async def test_backend_that_cannot_close_a_slot_fails_the_engine_after_the_answer() -> None:
    class Stuck(ScriptedBackend):
        __slots__ = ()

        def close_slot(self, slot: object) -> None:
            raise RuntimeError("sticky")

    engine = LocalEngine.over(Stuck("a"), ByteCodec())
    assert (await engine.generate("hi").result()).text == "a"
    with pytest.raises(EngineFailed, match="sticky"):
        engine.generate("hi")
    await engine.close()


async def test_capacity_error_in_a_step_is_a_failure_too() -> None:
    backend = ScriptedBackend("a", errors={0: OutOfCapacity("no K/V left")})
    async with engine_over(backend) as engine:
        with pytest.raises(EngineFailed, match="no K/V left"):
            await engine.generate("hi").result()


async def test_error_while_the_model_is_freed_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Heavy(ScriptedBackend):
        __slots__ = ()

        def close(self) -> None:
            raise RuntimeError("still in use")

    with caplog.at_level(logging.ERROR):
        async with LocalEngine.over(Heavy("a"), ByteCodec()) as engine:
            await engine.generate("hi").result()
    assert "cannot be freed" in caplog.text


async def test_bad_request_fails_alone() -> None:
    backend = ScriptedBackend("a" * 100)
    async with engine_over(backend) as engine:
        good = engine.generate("hi")
        with pytest.raises(InvalidPrompt):
            engine.generate([999])
        assert (await good.result()).text == "a" * 100


async def test_error_of_one_stream_s_text_ends_that_stream_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Picky(ByteCodec):
        def decode(self, ids: Sequence[int]) -> str:
            if ord("!") in ids:
                raise LookupError("no such token")
            return super().decode(ids)

    backend = ScriptedBackend({"good": "a" * 60, "bad": "aaa!"})
    engine = LocalEngine.over(backend, Picky())
    async with engine:
        good, bad = engine.generate("good"), engine.generate("bad")
        with pytest.raises(D2FError, match="no such token") as caught:
            await bad.result()
        assert not isinstance(caught.value, EngineFailed)
        assert (await good.result()).text == "a" * 60
        assert engine.usable
    check_clean(backend)


async def test_request_waits_for_room() -> None:
    backend = ScriptedBackend("a" * 50, capacity=250)
    async with engine_over(backend) as engine:
        sessions = [engine.generate(f"hi {i}", max_new_tokens=100) for i in range(6)]
        results = await asyncio.gather(*(session.result() for session in sessions))
    assert [result.text for result in results] == ["a" * 50] * 6
    assert max(len(batch) for batch in backend.batches) == 2


async def test_requests_that_wait_for_room_keep_their_order() -> None:
    backend = ScriptedBackend("a" * 20, capacity=150)
    order: list[int] = []
    async with engine_over(backend) as engine:

        async def ask(number: int) -> None:
            await engine.generate("hi", max_new_tokens=100).result()
            order.append(number)

        await asyncio.gather(*(ask(number) for number in range(6)))
    assert order == list(range(6))


async def test_request_that_could_never_fit_is_rejected_alone() -> None:
    backend = ScriptedBackend("a" * 50, capacity=250)
    async with engine_over(backend) as engine:
        with pytest.raises(OutOfCapacity, match="302 tokens was asked for, but 250 of 250"):
            await engine.generate("hi", max_new_tokens=300).result()
        fits, never, fits_too = (
            engine.generate("hi", max_new_tokens=count) for count in (100, 300, 100)
        )
        assert (await fits.result()).text == "a" * 50
        with pytest.raises(OutOfCapacity):
            await never.result()
        assert (await fits_too.result()).text == "a" * 50


async def test_rejected_request_has_no_events() -> None:
    async with engine_over(ScriptedBackend(capacity=10)) as engine:
        with pytest.raises(OutOfCapacity):
            await anext(engine.generate("hi").events())


async def test_queued_session_can_be_cancelled() -> None:
    gate = StepGate()
    backend = ScriptedBackend("a" * 50, capacity=150, gate=gate)
    async with engine_over(backend) as engine:
        running, queued = engine.generate("hi"), engine.generate("hi")
        await asyncio.to_thread(gate.wait_entered)
        queued.cancel()
        gate.open()
        assert (await queued.result()).reason == "cancelled"
        assert (await running.result()).text == "a" * 50
    assert backend.num_opened == 1


async def test_request_waits_for_room_that_another_engine_holds() -> None:
    gate = StepGate()
    backend = ScriptedBackend("a" * 20, capacity=150, gate=gate)
    model = MODELS.lease(None, "shared", lambda: ModelParts(backend, ByteCodec(), params()))
    holder, waiter = LocalEngine(model), LocalEngine(model)
    holding = holder.generate("hi")
    await asyncio.to_thread(gate.wait_entered)
    waiting = waiter.generate("hi")
    await turn()
    gate.open()
    assert (await waiting.result()).text == "a" * 20
    assert (await holding.result()).text == "a" * 20
    await holder.close()


async def test_load_error_reaches_the_requests_and_those_who_enter() -> None:
    def load() -> ModelParts:
        raise ModelDamaged("model.onnx has 3 bytes")

    engine = LocalEngine(MODELS.lease(None, "damaged", load))
    sessions = [engine.generate("hi") for _ in range(2)]
    for session in sessions:
        with pytest.raises(ModelDamaged, match="3 bytes"):
            await session.result()
    with pytest.raises(EngineFailed, match="3 bytes"):
        engine.generate("hi")
    await engine.close()
    with pytest.raises(ModelDamaged):
        async with LocalEngine(MODELS.lease(None, "damaged", load)):
            pass


async def test_load_error_that_is_not_ours_becomes_engine_failed() -> None:
    def load() -> ModelParts:
        raise OSError("disk")

    engine = LocalEngine(MODELS.lease(None, "damaged", load))
    with pytest.raises(EngineFailed, match="disk"):
        await engine.generate("hi").result()
    await engine.close()
