import asyncio
import threading

import pytest

from d2f_runtime.device import DeviceThread


@pytest.fixture
def device() -> DeviceThread:
    return DeviceThread("test-device")


async def test_calls_run_in_order_on_one_thread(device: DeviceThread) -> None:
    order: list[int] = []

    def note(number: int) -> str:
        order.append(number)
        return threading.current_thread().name

    names = await asyncio.gather(*(device.call(note, number) for number in range(20)))
    assert set(names) == {"test-device"}
    assert order == list(range(20))


async def test_idle_thread_looks_for_as_long_as_there_is_something_to_look_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("d2f_runtime.device.IDLE_S", 0.01)
    looked, left = threading.Semaphore(0), [True, True, False]

    def look() -> bool:
        looked.release()
        return left.pop(0)

    device = DeviceThread("looking", on_idle=look)
    await device.call(lambda: None)
    for _ in range(3):
        assert await asyncio.to_thread(looked.acquire, timeout=10)
    assert left == []
    device.stop()


async def test_error_reaches_the_caller_and_the_thread_goes_on(device: DeviceThread) -> None:
    with pytest.raises(ZeroDivisionError):
        await device.call(lambda: 1 / 0)
    assert await device.call(lambda: 5) == 5


async def test_stop_iteration_and_exits_become_runtime_errors(device: DeviceThread) -> None:
    def leave() -> None:
        raise SystemExit(3)

    with pytest.raises(RuntimeError, match="StopIteration"):
        await device.call(next, iter(()))
    with pytest.raises(RuntimeError, match="SystemExit"):
        await device.call(leave)


async def test_abandoned_call_runs_all_the_same(device: DeviceThread) -> None:
    go_on, ran = threading.Event(), threading.Event()
    device.call(go_on.wait)
    abandoned = device.call(ran.set)
    abandoned.cancel()
    go_on.set()
    assert await device.call(ran.is_set)


def test_event_loop_may_end_before_its_call(device: DeviceThread) -> None:
    go_on = threading.Event()

    async def leave() -> None:
        device.call(go_on.wait)

    asyncio.run(leave())
    go_on.set()

    async def ask() -> int:
        return await device.call(lambda: 5)

    assert asyncio.run(ask()) == 5


async def test_stopping_runs_what_is_queued_first(device: DeviceThread) -> None:
    order: list[str] = []
    queued = device.call(order.append, "queued")
    device.stop(last=lambda: order.append("last"))
    await queued
    await asyncio.to_thread(device.join, 10)
    assert order == ["queued", "last"]
    with pytest.raises(RuntimeError, match="stopped"):
        device.call(order.append, "never")
