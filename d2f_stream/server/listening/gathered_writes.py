"""GatheredWrites: a transport that sends at once what is written in one turn of the event loop.

Under load many streams of a connection have a block in the same turn. Each by itself would be a
packet, and a call of the system that costs more than everything else that is done to it.
"""

import asyncio
from typing import Any, Final

__all__ = ["GatheredWrites"]

MAX_GATHERED: Final = 16 * 1024
"""Bytes; more are sent at once, so that a reader that does not read is noticed as ever."""


class GatheredWrites(asyncio.Transport):
    """What a protocol writes to instead of its transport.

    Args:
        transport: open; where it goes.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self._transport = transport
        self._gathered: list[bytes] = []
        self._num_bytes = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send data, behind what was written before, at the latest in the next turn."""
        if not self._gathered:
            asyncio.get_running_loop().call_soon(self._send)
        self._gathered.append(bytes(data))
        self._num_bytes += len(data)
        if self._num_bytes >= MAX_GATHERED:
            self._send()

    def close(self) -> None:
        """Close it, once all is sent that was written."""
        self._send()
        self._transport.close()

    def abort(self) -> None:
        """Close it at once."""
        self._gathered.clear()
        self._num_bytes = 0
        self._transport.abort()

    def is_closing(self) -> bool:
        """Whether it is closed, or about to be."""
        return self._transport.is_closing()

    def get_write_buffer_size(self) -> int:
        """Return how much is not sent yet, bytes."""
        return self._num_bytes + self._transport.get_write_buffer_size()

    def pause_reading(self) -> None:
        """Receive nothing for now."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Receive again."""
        self._transport.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return what is known of the connection."""
        return self._transport.get_extra_info(name, default)

    def _send(self) -> None:
        if self._gathered:
            data = b"".join(self._gathered)
            self._gathered.clear()
            self._num_bytes = 0
            self._transport.write(data)
