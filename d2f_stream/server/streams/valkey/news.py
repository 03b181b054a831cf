"""News: what a store publishes, on one connection for all that a process wants to hear.

Publishing is not kept: what came while the connection was broken is gone, and has to be read from
the store. So `on_back` is called whenever the connection stands again.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Final

from d2f_stream.channels.patience import patient_timeout
from d2f_stream.core.errors import LogUnavailable
from d2f_stream.server.streams.valkey.connecting import (
    BACKOFF_S,
    LOST,
    AbstractConnection,
    ConnectionPool,
    exceptions,
    open_connection,
)

__all__ = ["News"]

logger = logging.getLogger("d2f_stream.server")

PATIENCE_S: Final = 5.0
PING_S: Final = 5.0
"""Where nothing comes for so long the store is asked whether it is there; twice, it is not."""


class News:
    """Channels of a store. Belongs to one event loop; `run` connects.

    Args:
        pool: makes the connection.
        on_message: is told of each message, with its channel; must not wait and must not raise.
        on_back: is told that messages may have been missed.
    """

    def __init__(
        self,
        pool: ConnectionPool,
        *,
        on_message: Callable[[str, bytes], None],
        on_back: Callable[[], None],
    ) -> None:
        self._pool = pool
        self._on_message = on_message
        self._on_back = on_back
        self._connection: AbstractConnection | None = None
        self._channels: dict[str, asyncio.Event] = {}  # set once the store has confirmed it
        self._unsent: list[tuple[str, ...]] = []
        self._is_silent = True  # since it was looked at last
        self._sending = asyncio.Event()

    async def subscribe(self, channel: str) -> None:
        """Hear a channel: what is published after this returns comes. Safe to cancel.

        Raises:
            LogUnavailable: the store does not confirm it.
        """
        confirmed = self._channels.get(channel)
        if confirmed is None:
            confirmed = self._channels[channel] = asyncio.Event()
            self._send("SUBSCRIBE", channel)
        try:
            async with patient_timeout(PATIENCE_S):
                await confirmed.wait()
        except TimeoutError:
            raise LogUnavailable(
                f"the log tells no news: it has not let us hear {channel} for {PATIENCE_S:g} s"
            ) from None

    def unsubscribe(self, channel: str) -> None:
        """Hear a channel no more. Idempotent."""
        if self._channels.pop(channel, None) is not None:
            self._send("UNSUBSCRIBE", channel)

    async def run(self) -> None:
        """Hear, through every loss of the connection, until cancelled."""
        number = 0
        while True:
            try:
                connection = await open_connection(self._pool)
            except (*LOST, exceptions.ValkeyError):
                await asyncio.sleep(BACKOFF_S[min(number, len(BACKOFF_S) - 1)])
                number += 1
                continue
            began_s = asyncio.get_running_loop().time()
            self._connection = connection
            self._unsent = [("SUBSCRIBE", channel) for channel in self._channels]
            self._sending.set()
            try:
                async with asyncio.TaskGroup() as group:
                    sending = group.create_task(self._keep_sending(connection))
                    asking = group.create_task(self._ask_until_silent())
                    reading = group.create_task(self._read_until_lost(connection))
                    ends = asyncio.FIRST_COMPLETED
                    await asyncio.wait((reading, asking), return_when=ends)
                    for task in (sending, asking, reading):
                        task.cancel()
            finally:
                with contextlib.suppress(*LOST):
                    await connection.disconnect(nowait=True)
            if asyncio.get_running_loop().time() - began_s > BACKOFF_S[-1]:
                number = 0
            else:  # it may refuse us again at once
                await asyncio.sleep(BACKOFF_S[min(number, len(BACKOFF_S) - 1)])
                number += 1

    def _send(self, *command: str) -> None:
        if self._connection is not None:
            self._unsent.append(command)
            self._sending.set()

    async def _keep_sending(self, connection: AbstractConnection) -> None:
        with contextlib.suppress(*LOST, exceptions.ValkeyError):  # the reader hears of it too
            while True:
                await self._sending.wait()
                self._sending.clear()
                commands, self._unsent = self._unsent, []
                if commands:
                    packed = connection.pack_commands(commands)
                    await connection.send_packed_command(packed, check_health=False)

    async def _ask_until_silent(self) -> None:
        """Ask whether the store is there where it says nothing; return once it says nothing then.

        Beside the reader: a time limit for each message costs as much as reading it.
        """
        is_asked = False
        while True:
            self._is_silent = True
            await asyncio.sleep(PING_S)
            if self._is_silent and is_asked:
                return
            if is_asked := self._is_silent:
                self._send("PING")

    async def _read_until_lost(self, connection: AbstractConnection) -> None:
        try:
            self._on_back()
            await self._read(connection)
        except (*LOST, exceptions.ValkeyError) as error:
            logger.debug("the log's news are lost: %s", error)
        finally:
            self._connection = None
            for confirmed in self._channels.values():
                confirmed.clear()

    async def _read(self, connection: AbstractConnection) -> None:
        while True:
            answer = await connection.read_response()
            self._is_silent = False
            match answer:
                case [b"message", bytes(channel), bytes(data)]:
                    self._on_message(channel.decode(), data)
                case [b"subscribe", bytes(channel), _]:
                    if (confirmed := self._channels.get(channel.decode())) is not None:
                        confirmed.set()
                case _:
                    pass
