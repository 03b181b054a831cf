"""What a connection sends in one turn of the event loop goes out together, in order."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from d2f_stream.server.listening.gathered_writes import MAX_GATHERED, GatheredWrites


@asynccontextmanager
async def gathering() -> AsyncIterator[tuple[GatheredWrites, asyncio.Transport, socket.socket]]:
    """Yield one over a real socket, the transport below, and the other end."""
    here, there = socket.socketpair()
    there.setblocking(False)
    transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=here)
    try:
        yield GatheredWrites(transport), transport, there
    finally:
        transport.abort()
        there.close()


def arrived(end: socket.socket) -> bytes:
    try:
        return end.recv(1 << 20)
    except BlockingIOError:
        return b"nothing"


async def test_writes_of_one_turn_go_out_together_in_the_next() -> None:
    async with gathering() as (gathered, _, there):
        for piece in (b"one ", b"two ", b"three"):
            gathered.write(piece)
        assert arrived(there) == b"nothing"
        assert gathered.get_write_buffer_size() == len(b"one two three")
        await asyncio.sleep(0)
        assert arrived(there) == b"one two three"
        assert gathered.get_write_buffer_size() == 0


async def test_much_goes_out_at_once_so_that_the_buffer_below_tells_who_does_not_read() -> None:
    async with gathering() as (gathered, transport, _):
        gathered.write(b"x" * MAX_GATHERED)
        size = gathered.get_write_buffer_size()
        assert size == transport.get_write_buffer_size()
        while transport.get_write_buffer_size() == 0:
            gathered.write(b"x" * MAX_GATHERED)
        gathered.write(b"last")
        assert gathered.get_write_buffer_size() > transport.get_write_buffer_size()


async def test_closing_sends_the_rest_and_aborting_does_not() -> None:
    async with gathering() as (gathered, _, there):
        gathered.write(b"last words")
        gathered.close()
        assert gathered.is_closing()
        assert arrived(there) == b"last words"
    async with gathering() as (gathered, _, there):
        gathered.write(b"last words")
        gathered.abort()
        await asyncio.sleep(0)
        assert arrived(there) == b""
