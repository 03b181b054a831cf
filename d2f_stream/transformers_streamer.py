"""A session's answer into a streamer of transformers: what model.generate(streamer=...) feeds.

TextStreamer, TextIteratorStreamer, AsyncTextIteratorStreamer and TextDiffusionStreamer work as they
are, and so does any object with `put` and `end`; transformers itself is not imported. Written
against transformers 5.23 (generation/streamers.py).
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from d2f_stream.errors import MissingExtra
from d2f_stream.events import Block, Draft
from d2f_stream.session import Result, Session

__all__ = ["Streamer", "stream_to"]

Ids = Callable[[Sequence[int]], object]


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
    feed = _Feed(streamer, ids or _array_maker())
    try:
        await feed.call(streamer.put, feed.ids(list(prompt_ids)))
        async for event in session.events():
            match event:
                case Block():
                    await feed.block(event)
                case Draft():
                    await feed.draft(event)
    finally:
        await feed.call(streamer.end)
    return await session.result()


class _Feed:
    """One answer's way into a streamer: remembers the drafts that are still shown."""

    def __init__(self, streamer: Streamer, ids: Ids) -> None:
        self.ids = ids
        self._streamer = streamer
        self._put_draft = getattr(streamer, "put_draft", None)
        self._drafts: dict[int, str] = {}

    async def block(self, block: Block) -> None:
        self._drafts.pop(block.index, None)
        await self.call(self._streamer.put, self.ids(list(block.token_ids)))
        if self._drafts:  # put has wiped them
            await self._show()

    async def draft(self, draft: Draft) -> None:
        if self._put_draft is not None:
            self._drafts[draft.index] = draft.text
            await self._show()

    async def _show(self) -> None:
        text = "".join(self._drafts[index] for index in sorted(self._drafts))
        tokenizer = getattr(self._streamer, "tokenizer", None)
        if self._put_draft is None or tokenizer is None:
            return
        value = self.ids(tokenizer.encode(text, add_special_tokens=False))
        await self.call(lambda: self._put_draft(value=value))  # type: ignore[misc]

    async def call(self, method: Callable[..., object], *arguments: object) -> None:
        """Run a method of the streamer on a thread; it ends before a cancellation goes on."""
        running = asyncio.ensure_future(asyncio.to_thread(method, *arguments))
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            await asyncio.wait([running])
            raise


def _array_maker() -> Ids:
    try:
        import numpy
    except ImportError as error:
        raise MissingExtra("feeding a transformers streamer", "numpy", "edge") from error
    return lambda ids: numpy.asarray(ids, dtype="int64")
