"""The event loop announces a step while the device thread is in the next one."""

import asyncio
import threading
from collections.abc import Callable, Sequence

import pytest

from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend, StepGate
from d2f_runtime.device import DeviceThread
from d2f_runtime.engine.local import Limits, LocalEngine
from d2f_runtime.loaded_model import MODELS, ModelParts
from d2f_stream.core.errors import D2FError, EngineFailed
from d2f_stream.core.events import Block, Draft, StreamFinished
from fakes import check_clean, engine_over, params, turn

LONG = "abcdefgh" * 100


class WatchedCodec(ByteCodec):
    """Calls `watch` before it decodes anything."""

    def __init__(self, watch: Callable[[Sequence[int]], object]) -> None:
        self._watch = watch

    def decode(self, ids: Sequence[int]) -> str:
        self._watch(ids)
        return super().decode(ids)


async def test_next_step_begins_without_the_event_loop() -> None:
    gate = StepGate()
    backend = ScriptedBackend(LONG, gate=gate)
    async with engine_over(backend) as engine:
        session = engine.generate("hi")
        await asyncio.to_thread(gate.wait_entered)
        gate.let_through()
        gate.wait_entered(2)  # holds this thread, so that nobody can plan or announce
        session.cancel()
        gate.open()


async def test_text_is_decoded_while_the_next_step_runs() -> None:
    gate, seen = StepGate(), threading.Event()

    def watch(_: Sequence[int]) -> None:
        gate.wait_entered(3)  # the block of 8 was committed by the second step of 4
        seen.set()

    engine = LocalEngine.over(ScriptedBackend(LONG, gate=gate), WatchedCodec(watch))
    async with engine:
        session = engine.generate("hi")
        gate.let_through(2)
        assert (await anext(session)).text == "abcdefgh"  # the third step is still held
        assert seen.is_set()
        session.cancel()
        gate.open()


async def test_step_is_announced_before_the_next_one_ends() -> None:
    gate = StepGate()
    async with engine_over(ScriptedBackend(LONG, gate=gate)) as engine:
        session = engine.generate("hi", drafts=True)
        gate.let_through(2)
        events = session.events()
        seen = [await anext(events)]
        while not isinstance(seen[-1], Block):
            seen.append(await anext(events))
        assert any(isinstance(event, Draft) for event in seen)
        session.cancel()
        gate.open()


async def test_stop_string_is_found_in_mid_step_and_that_step_changes_nothing() -> None:
    gate = StepGate()
    backend = ScriptedBackend(LONG, gate=gate)
    engine = LocalEngine.over(backend, WatchedCodec(lambda _: gate.wait_entered(3)))
    async with engine:
        session = engine.generate("hi", stop=("fg",))
        gate.let_through(2)
        assert (await anext(session)).text == "abcde"
        assert list(backend.open_slots) == [0]  # the device thread still writes to it
        gate.let_through()
        result = await session.result()
        assert backend.open_slots == {}
        assert (result.text, result.reason, result.usage.steps) == ("abcde", "stop", 2)
        assert len(result.token_ids) == 8
    assert backend.num_steps == 3
    check_clean(backend)


async def test_stop_string_of_one_stream_leaves_the_others_in_step() -> None:
    backend = ScriptedBackend({"stops": "one. Two", "goes on": "abcdefgh" * 10})
    async with engine_over(backend) as engine:
        stops, goes_on = engine.generate("stops", stop=(".",)), engine.generate("goes on")
        assert (await stops.result()).text == "one"
        assert (await goes_on.result()).text == "abcdefgh" * 10


async def test_answer_that_ends_by_itself_takes_no_step_in_vain() -> None:
    backend = ScriptedBackend("abcdefgh" * 4)
    async with engine_over(backend) as engine:
        result = await engine.generate("hi").result()
    assert backend.num_steps == result.usage.steps


async def test_end_is_not_held_back_by_the_next_step_of_others() -> None:
    gate = StepGate()
    backend = ScriptedBackend({"short": "abc", "long": LONG}, gate=gate)
    async with engine_over(backend) as engine:
        short, long = engine.generate("short"), engine.generate("long")
        await asyncio.to_thread(gate.wait_entered)
        gate.let_through()
        assert (await short.result()).text == "abc"  # the second step is still held
        assert list(backend.open_slots) == [1]
        long.cancel()
        gate.open()


async def test_cancelled_stream_keeps_nothing_of_the_steps_under_way() -> None:
    gate = StepGate()
    backend = ScriptedBackend(LONG, gate=gate, tokens_per_step=8)
    async with engine_over(backend) as engine:
        session = engine.generate("hi")
        gate.let_through()
        first = await anext(session)
        await asyncio.to_thread(gate.wait_entered, 2)
        session.cancel()
        gate.open()
        result = await session.result()
    assert (result.text, result.reason) == (first.text, "cancelled")
    assert result.usage.steps == 1
    assert backend.num_steps == 2


async def test_error_of_a_text_ends_its_stream_after_the_step_under_way() -> None:
    gate = StepGate()

    def watch(ids: Sequence[int]) -> None:
        if ord("!") in ids:
            gate.wait_entered(3)
            raise LookupError("no such token")

    backend = ScriptedBackend({"bad": "aaaaaaa!" * 9, "good": LONG}, gate=gate)
    engine = LocalEngine.over(backend, WatchedCodec(watch), defaults=params())
    async with engine:
        bad, good = engine.generate("bad"), engine.generate("good")
        await asyncio.to_thread(gate.wait_entered)
        gate.let_through(2)
        await turn()
        gate.open()
        with pytest.raises(D2FError, match="no such token"):
            await bad.result()
        assert (await good.result()).text == LONG[:128]
    check_clean(backend)


async def test_nothing_runs_after_a_step_that_failed() -> None:
    backend = ScriptedBackend(LONG, errors={2: RuntimeError("broken")})
    async with engine_over(backend) as engine:
        with pytest.raises(EngineFailed, match="broken"):
            await engine.generate("hi").result()
    assert backend.num_steps == 3


async def test_unread_stream_is_paused_one_step_after_the_high_mark_at_most() -> None:
    backend = ScriptedBackend(LONG, tokens_per_step=8)
    async with engine_over(backend) as engine:
        unread = engine.generate("hi", max_new_tokens=512)
        await anext(unread)
        await engine.generate("hi", max_new_tokens=512).result()
        waiting = len(unread.text) // 8 - 1
        assert 16 < waiting <= 18


async def test_step_is_taken_back_when_somebody_joins_and_keeps_its_turn() -> None:
    gate = StepGate()
    backend = ScriptedBackend(LONG, gate=gate)
    async with engine_over(backend, limits=Limits(max_rows=1)) as engine:
        first, second = engine.generate("one"), engine.generate("two")
        await asyncio.to_thread(gate.wait_entered)
        third = engine.generate("three")  # the step of the second was planned already
        gate.let_through(3)
        await asyncio.to_thread(gate.wait_entered, 4)
        for session in (first, second, third):
            session.cancel()
        gate.open()
    slots = [row.slot for batch in backend.batches for row in batch]
    assert slots[:4] == [0, 1, 0, 2]


async def test_observers_hear_of_each_step_once() -> None:
    backend = ScriptedBackend(LONG)
    async with engine_over(backend) as engine:
        seen: list[tuple[float, int]] = []
        engine.on_step(lambda wall_s, num_rows: seen.append((wall_s, num_rows)))
        result = await engine.generate("hi", max_new_tokens=64).result()
    assert [num_rows for _, num_rows in seen] == [1] * result.usage.steps
    assert all(wall_s > 0 for wall_s, _ in seen)


async def test_two_engines_of_a_model_take_turns() -> None:
    backend = ScriptedBackend(LONG)
    model = MODELS.lease(None, "shared", lambda: ModelParts(backend, ByteCodec(), params()))
    first, second = LocalEngine(model), LocalEngine(model)
    sessions = [engine.generate("hi") for engine in (first, second)]
    ends = [[e async for e in session.events()][-1] for session in sessions]
    assert all(isinstance(end, StreamFinished) and end.reason == "length" for end in ends)
    await first.close()


async def test_answer_of_a_call_comes_while_the_next_one_runs() -> None:
    device, begin, go_on = DeviceThread("answering"), threading.Event(), threading.Event()
    first, second = device.call(begin.wait), device.call(go_on.wait)
    begin.set()
    assert await first
    assert not second.done()
    go_on.set()
    assert await second
    device.stop()
    await asyncio.to_thread(device.join, 10)
    assert not [t for t in threading.enumerate() if t.name.startswith("answering")]
