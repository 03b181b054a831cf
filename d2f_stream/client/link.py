"""Link: one connection at a time between a conversation and its server, made again when it breaks.

Owns a reader and a writer task per connection, and ends both before the next. What is said is the
conversation's; how it travels is the channel's; how often it is tried is the backoff's.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from d2f_stream.channels import Channel, ChannelClosed
from d2f_stream.client.backoff import Backoff, Retries
from d2f_stream.client.conversation import Conversation
from d2f_stream.core.errors import ConnectionLost, EngineClosed, ProtocolError
from d2f_stream.wire.protocol import VERSION, ServerHello, ServerMessage

__all__ = ["Dial", "Link"]

logger = logging.getLogger("d2f_stream.client.websocket_engine")

HELLO_TIMEOUT_S: Final = 20.0
"""Longer than a server waits for a token, so that the reason of a refusal arrives."""

FAREWELL_S: Final = 1.0
"""How long the end of the event loop is held up to tell the server what to end."""

Dial = Callable[[], Awaitable[Channel]]
"""Opens a channel. Raises ChannelClosed where it may succeed later, ConnectionLost where the server
cannot be reached, and other errors of d2f_stream where trying again is of no use."""


class Link:
    """Keeps a conversation connected while it needs that.

    Args:
        dial: opens a channel.
        conversation: says what to send and takes what comes.
        backoff: when to try again.
        stay: whether an idle connection is kept; otherwise it is closed after `linger_s`.
        linger_s: seconds.
    """

    def __init__(
        self,
        dial: Dial,
        conversation: Conversation,
        *,
        backoff: Backoff,
        stay: Callable[[], bool],
        linger_s: float,
    ) -> None:
        self._dial = dial
        self._conversation = conversation
        self._retries = Retries(backoff)
        self._timeout_s = backoff.timeout_s
        self._clock = backoff.clock
        self._stay = stay
        self._linger_s = linger_s
        self._finishing = False
        self._heard = False
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Look again at what there is to do."""
        self._wake.set()

    def finish(self) -> None:
        """Close once nothing is left to say or to wait for."""
        self._finishing = True
        self._wake.set()

    async def run(self) -> None:
        """Stay connected for as long as the conversation needs it.

        Cancelled, it tells the server to end what runs, closes the channel, and ends.

        Raises:
            ConnectionLost: the server cannot be reached.
            D2FError: the server will not have us, or cannot be understood.
        """
        self._retries.reset()
        while self._needed():
            try:
                channel = await self._dial()
            except ConnectionLost as error:
                if self._conversation.hello is None:
                    raise  # a wrong address is told at once
                lost: Exception = error
            except ChannelClosed as error:
                lost = error
            else:
                closed = await self._use(channel)
                if closed is None:
                    continue
                final = self._conversation.closed(closed.code, closed.reason)
                if final is not None:
                    raise final from closed
                lost = closed
            logger.info("connection lost: %s", lost)
            if self._needed():
                await self._retries.wait(lost)

    def _needed(self) -> bool:
        if self._finishing:
            return False
        return self._conversation.busy or (self._stay() and self._conversation.hello is None)

    async def _use(self, channel: Channel) -> ChannelClosed | None:
        """Use a connection to its end; return why it broke, None where we were done with it."""
        began_s, self._heard = self._clock(), False
        reader = asyncio.create_task(self._read(channel), name="d2f-client-reader")
        writer = asyncio.create_task(self._write(channel), name="d2f-client-writer")
        try:
            await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await _stop(writer)
            await self._say_farewell(channel)
            raise
        finally:
            self._conversation.broken()
            await _stop(reader, writer)
            await channel.close()
        if self._heard or self._clock() - began_s > self._timeout_s:
            self._retries.reset()
        for task in (reader, writer):
            error = None if task.cancelled() else task.exception()
            if isinstance(error, ChannelClosed):
                return error
            if error is not None:
                raise error
        return None

    async def _read(self, channel: Channel) -> None:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = await _receive(channel)
        except TimeoutError:
            raise ChannelClosed(1006, f"no server.hello within {HELLO_TIMEOUT_S:g} s") from None
        if not isinstance(hello, ServerHello):
            raise ProtocolError("the server's first message is not server.hello")
        if hello.protocol != VERSION:
            raise ProtocolError(
                f"the server speaks version {hello.protocol} of the protocol and this client "
                f"{VERSION}; install the same version on both sides"
            )
        self._conversation.opened(hello)
        while True:
            message = await _receive(channel)
            self._heard = True
            if message is not None:
                self._conversation.receive(message)

    async def _write(self, channel: Channel) -> None:
        conversation = self._conversation
        while True:
            self._wake.clear()
            while (post := conversation.next_post()) is not None:
                await channel.send(channel.codec.encode(post.operation))
            if conversation.busy or (self._stay() and not self._finishing):
                await self._wake.wait()
            elif self._finishing:
                return
            else:
                try:
                    async with asyncio.timeout(self._linger_s):
                        await self._wake.wait()
                except TimeoutError:
                    return

    async def _say_farewell(self, channel: Channel) -> None:
        conversation = self._conversation
        conversation.abandon(EngineClosed("the engine's event loop was shut down"))
        with contextlib.suppress(ChannelClosed, TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                while (post := conversation.next_post()) is not None:
                    await channel.send(channel.codec.encode(post.operation))


async def _receive(channel: Channel) -> ServerMessage | None:
    return channel.codec.decode_message(await channel.receive())


async def _stop(*tasks: "asyncio.Task[None]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
