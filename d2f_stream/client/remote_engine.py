"""RemoteEngine: an engine whose model is elsewhere, used like a local one.

Many answers share one line to whoever gives them, so a session that is not read holds nothing up:
its events wait on this side, bounded by its `max_new_tokens`, and nobody pauses for it.
"""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Protocol, Self, Unpack

from d2f_stream.client.remote import new_request
from d2f_stream.core.buffer import EventBuffer
from d2f_stream.core.errors import D2FError, EngineClosed, InvalidRequest
from d2f_stream.core.events import Block, StreamNames
from d2f_stream.core.params import GenerationParams, ParamOverrides
from d2f_stream.core.session import Prompt, Session
from d2f_stream.wire.protocol import Generate, ModelCard

__all__ = ["Line", "RemoteEngine"]


class Line(Protocol):
    """Keeps a client in touch with whoever answers it. Belongs to one event loop."""

    @property
    def card(self) -> ModelCard | None:
        """What is served, once that was told."""
        ...

    @property
    def refusal(self) -> D2FError | None:
        """Why nothing is accepted any more, where we were turned away for good."""
        ...

    def ask(self, request: Generate, buffer: EventBuffer, names: StreamNames | None) -> None:
        """Take a request on, whose events `buffer` gets, and connect where that is not done.

        Raises:
            D2FError: it cannot be sent, or nobody takes it.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Give a request up. Idempotent."""
        ...

    async def enter(self) -> None:
        """Wait until the card is there, and stay connected from now on.

        Raises:
            D2FError: there is nobody, or we are not let in.
        """
        ...

    def shut(self) -> None:
        """End all requests, and begin to disconnect once that was said. Called once."""
        ...

    async def wait_closed(self) -> None:
        """Wait until nothing is left of it. Safe to cancel."""
        ...


class RemoteEngine:
    """An engine over a line; belongs to the event loop that it is first used on.

    `async with engine:` waits for a server or a worker, and ends all sessions at the end. Requests
    may come earlier, or without it: they connect by themselves, and the connection is closed when
    it has not been needed for a while.

    A request is sent under one id until its stream has started, and a server that still knows the
    id does not start it twice. Once it has started it is never sent again: if the server does not
    know the stream any more, the session fails with StreamLost. A lost connection is made again
    and every answer goes on where it broke off; no event is lost or seen twice.
    """

    def __init__(self, line: Line) -> None:
        self._line = line
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def info(self) -> ModelCard:
        """Facts about the model, once they were told."""
        card = self._line.card
        if card is None:
            raise RuntimeError("the model is not known yet; enter the engine with `async with`")
        return card

    @property
    def defaults(self) -> GenerationParams:
        """The parameters of a request that gives none, once they were told."""
        return self.info.params

    @property
    def usable(self) -> bool:
        """Whether requests are accepted: not closed, and not turned away for good."""
        return not self._closing and self._line.refusal is None

    def generate(
        self,
        prompt: Prompt,
        params: GenerationParams | None = None,
        *,
        names: StreamNames | None = None,
        committed: Sequence[Block] = (),
        raw: bool = True,
        **overrides: Unpack[ParamOverrides],
    ) -> Session:
        """Start a request; the session streams its answer.

        Args:
            prompt: chat messages, for the model's template; a string; or token ids.
            params: instead of the model's defaults.
            names: that the events carry instead of the server's.
            committed: must be empty; a server continues its own answers.
            raw: take a string verbatim, as a text to be continued; else it is a user's turn.
            overrides: single fields, on top of either.

        Raises:
            InvalidRequest: prompt or parameters cannot be sent, or are known not to fit. What only
                the server can tell, the session's first await raises.
            EngineClosed: the engine was closed.
            ServerShuttingDown: the server takes no more requests.
            MessageTooLarge: the request is larger than brokers usually allow.
            Unauthorized: we were not let in.
        """
        self._check_open()
        if committed:
            raise InvalidRequest(
                "a server is asked for whole answers; give `committed` to an engine in this process"
            )
        card = self._line.card
        defaults = None if card is None else card.params
        request = new_request(prompt, params, overrides, defaults=defaults, raw=raw)
        # One unread answer must not hold up the others of its connection: nothing is paused.
        buffer = EventBuffer(cancel=partial(self._line.cancel, request.request_id))
        self._line.ask(request, buffer, names)
        return Session(buffer)

    def shut(self) -> None:
        """Begin to close, without waiting. Idempotent."""
        self._check_loop()
        if not self._closing:
            self._closing = True
            self._line.shut()

    async def close(self) -> None:
        """End all sessions, tell those who answer them, and disconnect. Idempotent.

        Safe to cancel; the engine goes on closing. Who does not answer is waited for no longer
        than a few seconds.
        """
        self.shut()
        await self._line.wait_closed()

    async def __aenter__(self) -> Self:
        """Wait until it was told what is served.

        Raises:
            D2FError: nobody can be reached or lets us in, or the engine was closed.
        """
        self._check_open()
        try:
            await self._line.enter()
            self._check_open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Close the engine. Safe to cancel; the engine goes on closing."""
        await self.close()

    def _check_open(self) -> None:
        self._check_loop()
        if self._closing:
            raise EngineClosed("the engine was closed; connect() again")
        if self._line.refusal is not None:
            raise self._line.refusal

    def _check_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise RuntimeError("this engine belongs to another event loop; connect() here")
