"""WebsocketLine: one connection at a time to a server, made again when it breaks.

One task does the talking; it lives while there are requests, and while the line was entered. It
owns a reader and a writer task per connection, and ends both before the next. What is said is the
conversation's; how it travels is the channel's; how often it is tried is the backoff's.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from d2f_stream.channels import Channel, ChannelClosed
from d2f_stream.channels.patience import patient_timeout
from d2f_stream.client.backoff import Backoff, Retries
from d2f_stream.client.conversation import Conversation
from d2f_stream.client.remote_engine import RemoteEngine
from d2f_stream.core.buffer import EventBuffer
from d2f_stream.core.errors import (
    ConnectionLost,
    D2FError,
    EngineClosed,
    ProtocolError,
    ServerShuttingDown,
)
from d2f_stream.core.events import StreamNames
from d2f_stream.wire.protocol import VERSION, Generate, ModelCard, ServerHello, ServerMessage

__all__ = ["Dial", "WebsocketLine", "connect_websocket"]

logger = logging.getLogger("d2f_stream.client")

HELLO_TIMEOUT_S: Final = 20.0
"""Longer than a server waits for a token, so that the reason of a refusal arrives."""

LINGER_S: Final = 5.0
CLOSE_TIMEOUT_S: Final = 5.0

FAREWELL_S: Final = 1.0
"""How long the end of the event loop is held up to tell the server what to end."""

Dial = Callable[[], Awaitable[Channel]]
"""Opens a channel. Raises ChannelClosed where it may succeed later, ConnectionLost where the server
cannot be reached, and other errors of d2f_stream where trying again is of no use."""


class WebsocketLine:
    """Keeps a conversation connected while it needs that.

    A server that was never reached is not tried again; one that was, for `backoff.timeout_s`. Then
    every session fails with ConnectionLost, and the next request tries anew.

    Args:
        dial: opens a channel.
        backoff: when to try again.
        linger_s: how long an idle connection is kept where the line was not entered, seconds.
    """

    def __init__(self, dial: Dial, *, backoff: Backoff, linger_s: float) -> None:
        self.refusal: D2FError | None = None
        self._dial = dial
        self._conversation = Conversation(self._note_change)
        self._retries = Retries(backoff)
        self._timeout_s = backoff.timeout_s
        self._clock = backoff.clock
        self._linger_s = linger_s
        self._stays = False
        self._finishing = False
        self._heard = False
        self._wake = asyncio.Event()
        self._failure: D2FError | None = None  # of the last try
        self._task: asyncio.Task[None] | None = None
        self._answered = asyncio.Event()  # the server said hello, or the task has ended

    @property
    def card(self) -> ModelCard | None:
        """What the server serves, once it said hello."""
        hello = self._conversation.hello
        return None if hello is None else hello.model

    def ask(self, request: Generate, buffer: EventBuffer, names: StreamNames | None) -> None:
        """Take a request on, and connect where that is not done.

        Raises:
            ServerShuttingDown: the server takes no more requests.
        """
        closing = self._conversation.closing
        if closing is not None:
            raise ServerShuttingDown(closing.message)
        self._conversation.ask(request, buffer, names)
        self._start()

    def cancel(self, request_id: str) -> None:
        """Give a request up. Idempotent."""
        self._conversation.cancel(request_id)

    async def enter(self) -> None:
        """Wait until the server has said what it serves, and stay connected from now on.

        Raises:
            D2FError: it cannot be reached or does not let us in.
        """
        self._stays = True
        if self.card is None:
            self._start()
            await self._answered.wait()
            if self.card is None and not self._finishing:
                raise self._failure or EngineClosed("the engine's event loop was shut down")

    def shut(self) -> None:
        """End all requests, and close once the server knows."""
        self._conversation.abandon(EngineClosed("the engine was closed"))
        self._finishing = True
        self._wake.set()
        task = self._task
        if task is None or task.done():
            return
        if not self._conversation.up:
            task.cancel()  # nobody to wait for
            return
        limit = asyncio.get_running_loop().call_later(CLOSE_TIMEOUT_S, task.cancel)
        task.add_done_callback(lambda _: limit.cancel())

    async def wait_closed(self) -> None:
        """Wait until the connection is closed. Safe to cancel."""
        if self._task is not None:
            await asyncio.wait((self._task,))

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._failure = None
            self._answered.clear()
            self._task = asyncio.create_task(self._run(), name="d2f-client")

    def _note_change(self) -> None:
        if self.card is not None:
            self._answered.set()
        self._wake.set()

    async def _run(self) -> None:
        try:
            await self._stay_connected()
        except asyncio.CancelledError:
            self._conversation.fail(EngineClosed("the engine's event loop was shut down"))
            raise
        except D2FError as error:
            self._failure = error
            # A server that is away or out of order may come back; one that refuses us refuses us.
            if not isinstance(error, ConnectionLost | ProtocolError):
                self.refusal = error
            self._conversation.fail(error)
        except Exception as error:
            logger.exception("the client failed")
            self._failure = D2FError(f"the client failed: {error!r}")
            self._conversation.fail(self._failure)
        finally:
            self._answered.set()

    async def _stay_connected(self) -> None:
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
            # of a connection that was there, not of each attempt to have another
            was_there = isinstance(lost, ChannelClosed)
            logger.info("lost the server: %s", lost, extra={"lost": was_there and self._needed()})
            if self._needed():
                await self._retries.wait(lost)

    def _needed(self) -> bool:
        if self._finishing:
            return False
        return self._conversation.busy or (self._stays and self._conversation.hello is None)

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
            async with patient_timeout(HELLO_TIMEOUT_S):
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
            if conversation.busy or (self._stays and not self._finishing):
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


def connect_websocket(
    dial: Dial, *, backoff: Backoff | None = None, linger_s: float = LINGER_S
) -> RemoteEngine:
    """Return an engine over channels to one server; `WebsocketLine` says what it takes."""
    return RemoteEngine(WebsocketLine(dial, backoff=backoff or Backoff(), linger_s=linger_s))
