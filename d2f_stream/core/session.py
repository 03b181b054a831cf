"""Session: one request in progress, as its reader sees it; and the protocol of what makes sessions.

Knows events and buffers; nothing of models, devices or the wire, so a local and a remote engine
hand out the same class.

How a session ends early. Leaving `async with session`, calling `cancel()`, or letting go of the
last reference all give the stream up; the engine frees its slot within one step. A loop over
`generate(...)` holds the only reference, so `break`, an exception and a cancelled task end it too.
A session in a variable is held by the traceback of a cancelled task until that task is let go; use
`async with` there.
A session that is still held after a `break` stays alive and can be read on: at the buffer's high
mark its engine stops working for it, until it is read, cancelled, dropped, or its engine closes.
A session belongs to one event loop. Elsewhere what it holds can be read, and it can be cancelled;
where it would have to wait, that is an error, since nobody could wake the one who waits.
"""

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, Unpack

from d2f_stream.core.buffer import EventBuffer
from d2f_stream.core.error_codes import error_from
from d2f_stream.core.errors import D2FError, EngineClosed
from d2f_stream.core.events import (
    Block,
    Event,
    FinishReason,
    StreamFailed,
    StreamFinished,
    StreamNames,
    Timings,
    Usage,
)
from d2f_stream.core.params import GenerationParams, ParamOverrides

__all__ = ["Engine", "EngineInfo", "Prompt", "Result", "Session"]

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A string, token ids, or chat messages: `[{"role": "user", "content": "..."}]`."""


class EngineInfo(Protocol):
    """What an engine tells of its model."""

    @property
    def name(self) -> str:
        """For people and `StreamStarted.model`."""
        ...

    @property
    def family(self) -> str:
        """The kind of model: dream, llada, sdar, ..."""
        ...

    @property
    def native_block_size(self) -> int:
        """What the model was trained for, tokens."""
        ...

    @property
    def max_block_size(self) -> int:
        """Upper bound for a request's block size, tokens."""
        ...

    @property
    def max_len(self) -> int:
        """Prompt and answer together, tokens."""
        ...

    @property
    def description(self) -> str:
        """What the model can do, in a sentence or two for its users; may be empty."""
        ...

    @property
    def license(self) -> str:
        """Of the weights, such as "Apache-2.0"; empty where it is not known."""
        ...

    @property
    def examples(self) -> Sequence[str]:
        """Prompts that show what the model can do."""
        ...


class Engine(Protocol):
    """Serves requests for one model; an async context manager that closes it on exit."""

    @property
    def info(self) -> EngineInfo:
        """Facts about the model."""
        ...

    @property
    def defaults(self) -> GenerationParams:
        """The parameters of a request that gives none."""
        ...

    def generate(
        self,
        prompt: Prompt,
        params: GenerationParams | None = None,
        *,
        names: StreamNames | None = None,
        committed: Sequence[Block] = (),
        raw: bool = True,
        **overrides: Unpack[ParamOverrides],
    ) -> "Session":
        """Start a request; the session streams its answer, under the given names.

        With `committed`, the blocks that another engine has told of it, what follows them.
        A string is continued as it is; unless it is `raw`, a model that chats takes it as a turn.
        """
        ...

    async def __aenter__(self) -> Self:
        """Wait until the model is ready."""
        ...

    async def __aexit__(self, *exc: object) -> None:
        """End all sessions and free what the engine holds."""
        ...


@dataclass(frozen=True, slots=True)
class Result:
    """A whole answer.

    Attributes:
        text: the texts of its blocks together.
        token_ids: of all its blocks; the EOS is included where one ended it.
        reason: why it ended.
        usage: tokens and steps.
        timings: milliseconds.
    """

    text: str
    token_ids: tuple[int, ...]
    reason: FinishReason
    usage: Usage
    timings: Timings


class Session:
    """An answer in progress: an async iterator of its blocks, and an async context manager.

    One task reads at a time; a second one gets a RuntimeError. Made by engines, on the event loop
    that will read it; the producer's side is the EventBuffer that the engine keeps.
    """

    def __init__(self, buffer: EventBuffer) -> None:
        self._buffer = buffer
        self._loop = asyncio.get_running_loop()
        finalizer = weakref.finalize(self, _give_up, self._loop, buffer)
        finalizer.atexit = False

    @property
    def text(self) -> str:
        """The text committed so far, read or not."""
        return self._buffer.text

    @property
    def num_waiting(self) -> int:
        """Events that can be read without waiting, drafts left out."""
        return self._buffer.num_waiting

    def cancel(self) -> None:
        """Give the answer up; its slot is free within one step. Idempotent; from any thread.

        Blocks that were committed stay readable, then the iteration ends.
        """
        if self._is_here():
            self._buffer.cancel()
        else:
            _give_up(self._loop, self._buffer)

    async def result(self) -> Result:
        """Wait for the whole answer. Safe to cancel; no event is lost.

        From here on the stream runs without back-pressure: the events stay readable, and their
        number is bounded by the length of the answer. Any number of tasks may wait.

        Raises:
            D2FError: the request was turned away, or its stream failed; or the event loop that the
                session belongs to is closed.
            RuntimeError: the session belongs to another event loop, and has not ended.
        """
        buffer = self._buffer
        self._check_loop(waits=not buffer.ended)
        buffer.lift_marks()
        try:
            await buffer.wait_ended()
        finally:
            del self  # as in __anext__
        if buffer.error is not None:
            raise buffer.error
        end = buffer.terminal
        if not isinstance(end, StreamFinished):
            raise _failure_of(end)
        return Result(buffer.text, tuple(buffer.token_ids), end.reason, end.usage, end.timings)

    def __await__(self) -> Generator[object, None, Result]:
        """Wait for the whole answer, as `result`: `result = await generate(...)`."""
        return self.result().__await__()

    def events(self) -> AsyncIterator[Event]:
        """Iterate over every event: StreamStarted, blocks, drafts where asked for, and the end.

        A stream that fails ends with StreamFailed and raises nothing.
        """
        return _Events(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Block:
        """Wait for the next block. Safe to cancel; no event is lost.

        Raises:
            D2FError: the request was turned away, or its stream failed; or the event loop that the
                session belongs to is closed.
            RuntimeError: the session belongs to another event loop, or another task reads it.
        """
        buffer = self._buffer
        try:
            while (event := await self._next()) is not None:
                if isinstance(event, Block):
                    return event
        finally:
            # The traceback of a cancelled read keeps this frame; it must not keep the session.
            del self
        if isinstance(buffer.terminal, StreamFailed):
            raise _failure_of(buffer.terminal)
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Cancel, and wait until the slot is free. Safe to cancel; it is freed all the same."""
        self.cancel()
        if self._is_here():
            await self._buffer.wait_ended()

    async def _next(self) -> Event | None:
        buffer = self._buffer
        self._check_loop(waits=buffer.would_wait)
        del self  # as in __anext__
        return await buffer.get()

    def _is_here(self) -> bool:
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

    def _check_loop(self, *, waits: bool) -> None:
        if self._is_here():
            return
        if self._loop.is_running() or (waits and not self._loop.is_closed()):
            raise RuntimeError("this session belongs to another event loop; read it there")
        if waits:
            raise EngineClosed("the event loop was closed in which the session was started")


class _Events:
    def __init__(self, session: Session) -> None:
        self._session = session

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        try:
            event = await self._session._next()
        finally:
            del self
        if event is None:
            raise StopAsyncIteration
        return event


def _give_up(loop: asyncio.AbstractEventLoop, buffer: EventBuffer) -> None:
    # Runs wherever the last reference went: on another thread, or amid the engine's own code.
    if buffer.ended:
        return
    try:
        loop.call_soon_threadsafe(buffer.cancel)
    except RuntimeError:  # the loop is closed: nobody else touches the buffer any more
        with contextlib.suppress(RuntimeError):
            buffer.cancel()


def _failure_of(event: StreamFailed | None) -> D2FError:
    assert event is not None, "a stream ended without a terminal event"
    return error_from(event.code, event.message)
