"""Sockets: every connection of a server, and which of them goes when a new one comes.

Who can connect can also keep connections open, so those on which nothing happens have a share only,
and the oldest goes first: those that have not sent a whole request (silent), and those between two
requests (kept). Who is being answered is never closed for somebody else.
"""

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable
from typing import Final

from d2f_stream.server.peer_log import PeerLog

__all__ = ["Sockets", "accept_forever", "max_sockets", "raise_file_limit"]

RESERVED_FILES: Final = 48
"""For models, logs and whatever else the process opens while it serves."""
MAX_FILES: Final = 65_536
RETRY_S: Final = 0.1
OUT_OF_RESOURCES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
FULL: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    b"Connection: close\r\nContent-Length: 123\r\n\r\n"
    b'{"error": {"message": "all connections of this server are in use", '
    b'"type": "server_error", "code": "too_many_connections"}}'
)

log = PeerLog(logging.getLogger("d2f_stream.server"))


class Sockets:
    """The open connections of one server.

    Args:
        most: connections at once.
        most_idle: of those, silent ones, and kept ones.
    """

    def __init__(self, *, most: int, most_idle: int) -> None:
        self._most = most
        self._most_idle = most_idle
        self._silent: dict[asyncio.Transport, None] = {}  # the oldest first, as in the next
        self._kept: dict[asyncio.Transport, None] = {}
        self._busy: set[asyncio.Transport] = set()

    def __len__(self) -> int:
        return len(self._silent) + len(self._kept) + len(self._busy)

    def make_room(self) -> bool:
        """Close an idle connection where a new one needs its place; False where there is none."""
        if len(self) < self._most:
            return True
        return self._close_oldest(self._silent) or self._close_oldest(self._kept)

    def note_silent(self, transport: asyncio.Transport) -> None:
        """The connection is new, or its request is not complete."""
        if transport not in self._silent:
            self.discard(transport)
            self._silent[transport] = None
            if len(self._silent) > self._most_idle:
                self._close_oldest(self._silent)

    def note_kept(self, transport: asyncio.Transport) -> None:
        """The connection waits for its next request."""
        self.discard(transport)
        self._kept[transport] = None
        if len(self._kept) > self._most_idle:
            self._close_oldest(self._kept)

    def note_busy(self, transport: asyncio.Transport) -> None:
        """Its request is complete, or it speaks a protocol of its own."""
        self.discard(transport)
        self._busy.add(transport)

    def discard(self, transport: asyncio.Transport) -> None:
        """It is gone. Idempotent."""
        self._silent.pop(transport, None)
        self._kept.pop(transport, None)
        self._busy.discard(transport)

    def _close_oldest(self, idle: dict[asyncio.Transport, None]) -> bool:
        oldest = next(iter(idle), None)
        if oldest is None:
            return False
        log.info("closing an idle connection, since %s are open", len(self))
        self.discard(oldest)
        oldest.abort()
        return True


async def accept_forever(
    listener: socket.socket, sockets: Sockets, protocol: Callable[[], asyncio.BaseProtocol]
) -> None:
    """Take connections as long as there is room for them. Ends by cancellation only.

    asyncio's own servers try again and again where the process may open no more files, and write a
    traceback each time.

    Args:
        listener: not blocking; stays open.
        sockets: says whether there is room.
        protocol: makes one for each connection.
    """
    loop = asyncio.get_running_loop()
    while True:
        try:
            accepted, _ = await loop.sock_accept(listener)
        except OSError as error:
            if error.errno in OUT_OF_RESOURCES:
                log.warning("no connection can be taken now: %s", error)
                await asyncio.sleep(RETRY_S)
            continue  # else the peer has hung up already
        if not sockets.make_room():
            log.warning("a connection is refused: all %s are in use", len(sockets))
            with accepted, contextlib.suppress(OSError):
                accepted.send(FULL)
            continue
        try:
            await loop.connect_accepted_socket(protocol, accepted)
        except OSError:
            accepted.close()
        except asyncio.CancelledError:
            accepted.close()
            raise


def raise_file_limit() -> None:
    """Let this process open as many files as it may ask for: each connection is one."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def max_sockets(wanted: int) -> int:
    """Return how many connections there can be: `wanted`, or what the process's limit leaves."""
    try:
        import resource
    except ImportError:
        return wanted
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    try:
        used = len(os.listdir("/dev/fd"))
    except OSError:
        used = RESERVED_FILES
    return max(1, min(wanted, soft - used - RESERVED_FILES))
