"""A session's answer into a streamer of transformers: what model.generate(streamer=...) feeds.

TextStreamer, TextIteratorStreamer, AsyncTextIteratorStreamer and TextDiffusionStreamer work as they
are, and so does any object with `put` and `end`; transformers itself is not imported. Written
against transformers 5.23 (generation/streamers.py).
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from d2f_stream.core.buffer import EventBuffer
from d2f_stream.core.errors import D2FError, EngineClosed, InvalidParams, MissingExtra
from d2f_stream.core.events import Block, Draft, Event, StreamFailed, StreamFinished
from d2f_stream.core.session import Result, Session

__all__ = ["Feed", "Streamer", "stream_to"]

logger = logging.getLogger("d2f_stream.streamer")

Ids = Callable[[Sequence[int]], object]

_followers: Final[set[asyncio.Task[None]]] = set()  # an event loop holds its tasks weakly


class Streamer(Protocol):
    """What transformers calls a streamer; one that shows drafts has `put_draft` too."""

    def put(self, value: Any) -> object:
        """Take the ids of the prompt first, then final ids."""
        ...

    def end(self) -> object:
        """Take note that nothing follows."""
        ...


async def stream_to(
    session: Session,
    streamer: Streamer,
    *,
    prompt_ids: Sequence[int] = (),
    ids: Ids | None = None,
) -> Result:
    """Feed a streamer with a session's answer, block by block; return the whole answer.

    The streamer gets what `model.generate` gives it: the prompt, then the ids of each final block,
    an EOS included. A stop string is in the ids of its block, as there. `end` is called however
    the answer ends, so nobody waits for a streamer in vain.

    Drafts go to `put_draft(value=...)` where the streamer has that and the request asked for them
    (drafts=True): the ids of all that is provisional, encoded by the streamer's own `tokenizer`.

    The streamer's methods run one after the other on a thread, since they may print, sleep or wait.
    Safe to cancel; the call in flight is waited for.

    Args:
        session: nobody else reads it.
        streamer: see above.
        prompt_ids: what a streamer without skip_prompt shows first; the first `put` takes it, even
            if there are none.
        ids: makes the value of `put` from a list, such as torch.tensor; by default an int64 array
            of numpy, which transformers' own streamers take.

    Raises:
        D2FError: the request was turned away, or its stream failed.
        MissingExtra: `ids` is not given and numpy is not installed.
    """
    feed = Feed(streamer, prompt_ids=prompt_ids, ids=ids)
    try:
        await feed.begin()
        async for event in session.events():
            await feed.take(event)
    finally:
        await feed.end()
    return await session.result()


class Feed:
    """One answer's way into a streamer: remembers the drafts that are still shown.

    Args: see `stream_to`.

    Raises:
        InvalidParams: the streamer lacks `put` or `end`.
        MissingExtra: `ids` is not given and numpy is not installed.
    """

    def __init__(
        self, streamer: Streamer, *, prompt_ids: Sequence[int] = (), ids: Ids | None = None
    ) -> None:
        if not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
            raise InvalidParams("streamer", streamer, "an object with the methods put and end")
        self._ids = ids or _array_maker()
        self._prompt_ids = list(prompt_ids)
        self._streamer = streamer
        self._put_draft = getattr(streamer, "put_draft", None)
        self._drafts: dict[int, str] = {}

    @property
    def wants_drafts(self) -> bool:
        """Whether the streamer shows them."""
        return self._put_draft is not None

    def follow(self, session: Session) -> Session:
        """Feed the streamer beside the reader; return a session of the same answer for that one.

        An event reaches the reader once the streamer has taken it, and the end once the streamer's
        `end` has returned. Nobody need read: the streamer sets the pace, and until the session is
        read for the first time, letting go of it does not end the answer. Where the streamer
        raises, the answer is cancelled, and reading raises a D2FError with the streamer's as cause.
        """
        buffer = _FollowedBuffer(cancel=session.cancel, pause=_nothing, resume=_nothing)
        buffer.lift_marks()
        buffer.unread = followed = Session(buffer)
        task = asyncio.create_task(self._follow(session, buffer), name="d2f-streamer")
        _followers.add(task)
        task.add_done_callback(_followers.discard)
        return followed

    async def begin(self) -> None:
        """Give the prompt; the first `put` takes it, even if there is none."""
        await self._call(self._streamer.put, self._ids(self._prompt_ids))

    async def take(self, event: Event) -> None:
        """Give what an event shows."""
        match event:
            case Block():
                self._drafts.pop(event.index, None)
                await self._call(self._streamer.put, self._ids(list(event.token_ids)))
                if self._drafts:  # put has wiped them
                    await self._show()
            case Draft() if self.wants_drafts:
                self._drafts[event.index] = event.text
                await self._show()
            case _:
                pass

    async def end(self) -> None:
        """Tell that nothing follows."""
        await self._call(self._streamer.end)

    async def _follow(self, session: Session, buffer: "_FollowedBuffer") -> None:
        """Pass every event on, the terminal one last; whatever happens, the buffer ends."""
        last: Event | None = None
        try:
            try:
                await self.begin()
                async for event in session.events():
                    await self.take(event)
                    if isinstance(event, StreamFinished | StreamFailed):
                        last = event
                    else:
                        buffer.append(event)
            finally:
                await self.end()
            assert last is not None
            buffer.append(last)
        except asyncio.CancelledError:
            buffer.reject(EngineClosed("the event loop was shut down"))
            raise
        except D2FError as error:
            buffer.reject(error)
        except Exception as error:
            logger.error("a streamer failed", exc_info=error)  # perhaps nobody reads
            failure = D2FError(f"the streamer failed: {error!r}")
            failure.__cause__ = error
            buffer.reject(failure)
        finally:
            session.cancel()
            buffer.unread = None

    async def _show(self) -> None:
        text = "".join(self._drafts[index] for index in sorted(self._drafts))
        tokenizer = getattr(self._streamer, "tokenizer", None)
        if self._put_draft is None or tokenizer is None:
            return
        value = self._ids(tokenizer.encode(text, add_special_tokens=False))
        await self._call(lambda: self._put_draft(value=value))  # type: ignore[misc]

    async def _call(self, method: Callable[..., object], *arguments: object) -> None:
        """Run a method of the streamer on a thread; it ends before a cancellation goes on."""
        running = asyncio.ensure_future(asyncio.to_thread(method, *arguments))
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            await asyncio.wait([running])
            raise


class _FollowedBuffer(EventBuffer):
    """Holds its session until that is read for the first time: the streamer may be all who reads.

    Attributes:
        unread: the session, until then.
    """

    unread: Session | None = None

    async def get(self) -> Event | None:
        self.unread = None
        return await super().get()

    async def wait_ended(self) -> None:
        self.unread = None
        await super().wait_ended()


def _nothing() -> None:
    """Pause nobody: the streamer sets the pace."""


def _array_maker() -> Ids:
    try:
        import numpy
    except ImportError as error:
        raise MissingExtra("feeding a transformers streamer", "numpy", "edge") from error
    return lambda ids: numpy.asarray(ids, dtype="int64")
