import asyncio

import pytest

from d2f_stream.channels import ChannelClosed
from d2f_stream.channels.memory import MemoryChannel


async def test_messages_arrive_in_order_in_both_directions() -> None:
    left, right = MemoryChannel.pair()
    for number in range(3):
        await left.send(b"l%d" % number)
        await right.send(b"r%d" % number)
    assert [await right.receive() for _ in range(3)] == [b"l0", b"l1", b"l2"]
    assert [await left.receive() for _ in range(3)] == [b"r0", b"r1", b"r2"]


async def test_sender_waits_for_a_reader_that_is_behind() -> None:
    left, right = MemoryChannel.pair(capacity=2)
    await left.send(b"0")
    await left.send(b"1")
    blocked = asyncio.create_task(left.send(b"2"))
    await asyncio.sleep(0)
    assert not blocked.done()
    assert await right.receive() == b"0"
    await blocked
    assert [await right.receive(), await right.receive()] == [b"1", b"2"]


async def test_close_delivers_what_was_sent_and_then_says_why() -> None:
    left, right = MemoryChannel.pair()
    await left.send(b"last")
    await left.close(1012, "restart")
    assert await right.receive() == b"last"
    for end in (left, right):
        with pytest.raises(ChannelClosed) as caught:
            await end.receive()
        assert (caught.value.code, caught.value.reason) == (1012, "restart")
        with pytest.raises(ChannelClosed):
            await end.send(b"too late")


async def test_severed_connection_loses_what_was_not_received() -> None:
    left, right = MemoryChannel.pair(capacity=1)
    await left.send(b"lost")
    blocked = asyncio.create_task(left.send(b"never"))
    waiting = asyncio.create_task(left.receive())
    await asyncio.sleep(0)
    left.sever()
    for end in (blocked, waiting, asyncio.create_task(right.receive())):
        with pytest.raises(ChannelClosed) as caught:
            await end
        assert caught.value.code == 1006
