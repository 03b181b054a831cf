"""Tasks are ended, also where one keeps its cancellation or the caller is cancelled."""

import asyncio
import contextlib

import pytest

from d2f_stream.channels.ending import end_tasks

HANGS_S = 20.0


async def test_task_whose_cancellation_is_swallowed_ends_all_the_same() -> None:
    answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def work() -> None:
        await asyncio.wait_for(answered, 5.0)
        await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    answered.set_result(None)  # at this very moment it is to end
    async with asyncio.timeout(HANGS_S):
        await end_tasks(task)
    assert task.cancelled()


async def test_cancellation_meanwhile_is_raised_after_the_tasks_have_ended() -> None:
    ending, may_end = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ending.set()
            while not may_end.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await may_end.wait()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    caller = asyncio.create_task(end_tasks(task))
    await ending.wait()
    caller.cancel()
    await asyncio.sleep(0)
    assert not caller.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert task.done()
