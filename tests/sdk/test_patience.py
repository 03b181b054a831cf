import asyncio

import pytest

from d2f_stream.channels.patience import LOOKS, Patience, patient_timeout
from fakes import turn
from stalls import stall

TIME_S = 100.0
SHARE_S = TIME_S / LOOKS


async def test_time_that_is_over_is_told_once_with_the_arguments() -> None:
    told: list[str] = []
    Patience(TIME_S, told.append, "over")
    for _ in range(LOOKS):
        assert told == []
        stall(SHARE_S)
        await turn()
    assert told == ["over"]
    stall()
    await turn()
    assert told == ["over"]


@pytest.mark.parametrize("num_before", range(LOOKS - 1))
async def test_stall_of_any_length_costs_one_share(num_before: int) -> None:
    told: list[str] = []
    Patience(TIME_S, told.append, "over")
    for _ in range(num_before):
        stall(SHARE_S)
        await turn()
    stall()
    await turn()
    for _ in range(LOOKS - 1 - num_before):
        assert told == []
        stall(SHARE_S)
        await turn()
    assert told == ["over"]


async def test_stall_that_ends_in_time_costs_one_share_too() -> None:
    told: list[str] = []
    Patience(TIME_S, told.append, "over")
    stall(TIME_S - 1.0)
    await turn()
    stall(1.0)
    await turn()
    assert told == []


async def test_cancelled_patience_tells_nothing() -> None:
    told: list[str] = []
    patience = Patience(TIME_S, told.append, "over")
    stall(SHARE_S)
    await turn()
    patience.cancel()
    patience.cancel()
    for _ in range(LOOKS):
        stall(SHARE_S)
        await turn()
    assert told == []


async def test_timeout_ends_what_takes_longer() -> None:
    with pytest.raises(TimeoutError):
        async with patient_timeout(0.0):
            await asyncio.Event().wait()


async def test_timeout_lets_what_came_in_a_stall_be_taken() -> None:
    came = asyncio.Event()
    async with patient_timeout(TIME_S):
        asyncio.get_running_loop().call_soon(came.set)
        stall()
        await came.wait()
    for _ in range(LOOKS):
        stall()
        await turn()  # nothing is cancelled once it was left


async def test_no_timeout_waits_for_good() -> None:
    async with patient_timeout(None):
        stall()
        await turn()


async def test_cancellation_is_no_timeout() -> None:
    async def wait() -> None:
        async with patient_timeout(TIME_S):
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await turn()
    task.cancel()
    await asyncio.wait((task,))
    assert task.cancelled()
