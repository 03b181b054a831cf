"""RemoteEngine: an engine whose model is elsewhere, used like a local one.

Joins a conversation, which knows what was asked, to a link, which keeps it connected. One task per
engine does the talking; it lives while there are requests, and while `async with` holds the engine.

A lost connection is made again and every answer goes on where it broke off; no event is lost or
seen twice. Many answers share one connection, so a session that is not read holds nothing up: its
events wait on this side, bounded by its `max_new_tokens`, and the server does not pause for it.
"""

import asyncio
import logging
from functools import partial
from types import TracebackType
from typing import Final, Self, Unpack

from d2f_stream.client.backoff import Backoff
from d2f_stream.client.conversation import Conversation
from d2f_stream.client.link import Dial, Link
from d2f_stream.client.remote import new_request
from d2f_stream.core.buffer import EventBuffer
from d2f_stream.core.errors import (
    ConnectionLost,
    D2FError,
    EngineClosed,
    ProtocolError,
    ServerShuttingDown,
)
from d2f_stream.core.events import StreamNames
from d2f_stream.core.params import GenerationParams, ParamOverrides
from d2f_stream.core.session import Prompt, Session
from d2f_stream.wire.protocol import (
    ModelCard,
)

__all__ = ["RemoteEngine"]

logger = logging.getLogger("d2f_stream.client.websocket_engine")

LINGER_S: Final = 5.0
CLOSE_TIMEOUT_S: Final = 5.0


class RemoteEngine:
    """An engine over a connection; belongs to the event loop that it is first used on.

    `async with engine:` waits for the server and ends all sessions at the end. Requests may come
    earlier, or without it: they connect by themselves, and the connection is closed when it has
    not been needed for a while.

    A server that was never reached is not tried again; one that was, for `backoff.timeout_s`. Then
    every session fails with ConnectionLost, and the next request tries anew.

    A request is sent under one id until its stream has started, and a server that still knows the
    id does not start it twice. Once it has started it is never sent again: if the server does not
    know the stream any more, the session fails with StreamLost.

    Args:
        dial: opens a channel to the server.
        backoff: when to try again.
        linger_s: how long an idle connection is kept outside `async with`, seconds.
    """

    def __init__(
        self,
        dial: Dial,
        *,
        backoff: Backoff | None = None,
        linger_s: float = LINGER_S,
    ) -> None:
        self._conversation = Conversation(self._note_change)
        self._link = Link(
            dial,
            self._conversation,
            backoff=backoff or Backoff(),
            stay=lambda: self._entered,
            linger_s=linger_s,
        )
        self._entered = False
        self._closing = False
        self._failure: D2FError | None = None  # of the last try
        self._refused = False  # for good
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._answered = asyncio.Event()  # the server said hello, or the task has ended

    @property
    def info(self) -> ModelCard:
        """Facts about the model, once the server has told them."""
        hello = self._conversation.hello
        if hello is None:
            raise RuntimeError("the server is not known yet; enter the engine with `async with`")
        return hello.model

    @property
    def defaults(self) -> GenerationParams:
        """The parameters of a request that gives none, once the server has told them."""
        return self.info.params

    @property
    def usable(self) -> bool:
        """Whether requests are accepted: not closed, and not turned away for good."""
        return not self._closing and not self._refused

    def generate(
        self,
        prompt: Prompt,
        params: GenerationParams | None = None,
        *,
        names: StreamNames | None = None,
        **overrides: Unpack[ParamOverrides],
    ) -> Session:
        """Start a request; the session streams its answer.

        Args:
            prompt: a string, taken verbatim; chat messages, for the model's template; or token ids.
            params: instead of the model's defaults.
            names: that the events carry instead of the server's.
            overrides: single fields, on top of either.

        Raises:
            InvalidRequest: prompt or parameters cannot be sent, or are known not to fit. What only
                the server can tell, the session's first await raises.
            EngineClosed: the engine was closed.
            ServerShuttingDown: the server takes no more requests.
            Unauthorized: the server did not accept the token.
        """
        self._check_open()
        hello = self._conversation.hello
        request = new_request(
            prompt,
            params,
            overrides,
            defaults=hello.model.params if hello else None,
        )
        # One unread answer must not hold up the others of its connection: nothing is paused.
        buffer = EventBuffer(cancel=partial(self._conversation.cancel, request.request_id))
        self._conversation.ask(request, buffer, names)
        self._start()
        return Session(buffer)

    def shut(self) -> None:
        """Begin to close, without waiting. Idempotent."""
        self._check_loop()
        if self._closing:
            return
        self._closing = True
        self._conversation.abandon(EngineClosed("the engine was closed"))
        self._link.finish()
        task = self._task
        if task is None or task.done():
            return
        if not self._conversation.up:
            task.cancel()  # nobody to wait for
            return
        limit = asyncio.get_running_loop().call_later(CLOSE_TIMEOUT_S, task.cancel)
        task.add_done_callback(lambda _: limit.cancel())

    async def close(self) -> None:
        """End all sessions, wait until the server has ended them, and disconnect. Idempotent.

        Safe to cancel; the engine goes on closing. A server that does not answer is waited for no
        longer than a few seconds.
        """
        self.shut()
        if self._task is not None:
            await asyncio.wait((self._task,))

    async def __aenter__(self) -> Self:
        """Wait until the server has said what it serves.

        Raises:
            D2FError: it cannot be reached or does not let us in, or the engine was closed.
        """
        self._check_open()
        self._entered = True
        try:
            if self._conversation.hello is None:
                self._start()
                await self._answered.wait()
                if self._conversation.hello is None:
                    self._check_open()
                    raise self._failure or EngineClosed("the engine's event loop was shut down")
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the engine. Safe to cancel; the engine goes on closing."""
        await self.close()

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._failure = None
            self._answered.clear()
            self._task = asyncio.create_task(self._run(), name="d2f-client")

    async def _run(self) -> None:
        try:
            await self._link.run()
        except asyncio.CancelledError:
            self._conversation.fail(EngineClosed("the engine's event loop was shut down"))
            raise
        except D2FError as error:
            self._failure = error
            # A server that is away or out of order may come back; one that refuses us refuses us.
            self._refused = not isinstance(error, ConnectionLost | ProtocolError)
            self._conversation.fail(error)
        except Exception as error:
            logger.exception("the client failed")
            self._failure = D2FError(f"the client failed: {error!r}")
            self._conversation.fail(self._failure)
        finally:
            self._answered.set()

    def _note_change(self) -> None:
        if self._conversation.hello is not None:
            self._answered.set()
        self._link.wake()

    def _check_open(self) -> None:
        self._check_loop()
        if self._closing:
            raise EngineClosed("the engine was closed; connect() again")
        if self._refused and self._failure is not None:
            raise self._failure
        closing = self._conversation.closing
        if closing is not None:
            raise ServerShuttingDown(closing.message)

    def _check_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise RuntimeError("this engine belongs to another event loop; connect() here")
