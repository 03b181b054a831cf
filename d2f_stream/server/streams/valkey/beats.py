"""Beats: what a process tells the store at short intervals, and looks at there.

It renews the leases that it holds, says which streams have readers here, and sees which of the
streams that it follows have lost their worker.
"""

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from d2f_stream.channels.ending import end_tasks
from d2f_stream.core.errors import LogUnavailable
from d2f_stream.server.streams.served_stream import ServedStream
from d2f_stream.server.streams.valkey import scripts
from d2f_stream.server.streams.valkey.store import Reply
from d2f_stream.server.streams.valkey.work import ValkeyWork

if TYPE_CHECKING:
    from d2f_stream.server.streams.valkey.log import ValkeyLog

__all__ = ["Beats", "Times"]

logger = logging.getLogger("d2f_stream.server")

IDLE_TTL_S: Final = 600.0
"""A stream that has not ended and that nobody works for is kept for so long."""
BEATS: Final = 4
"""In the time of a lease."""
READ_BEATS: Final = 12
"""Without news of a server after which its readers count as gone; it has news every third."""


@dataclass(frozen=True, slots=True)
class Times:
    """Times of a log, in milliseconds.

    Attributes:
        lease_ms: for which a worker may be silent.
        ttl_ms: for which a stream is kept after its end.
        idle_ms: for which one is kept that has not ended, and has no worker.
    """

    lease_ms: int
    ttl_ms: int
    idle_ms: int

    @classmethod
    def of(cls, lease_s: float, resume_ttl_s: float) -> Self:
        """Return those of a log with such a lease, and a server's limit, seconds."""
        ttl_ms = max(1, int(resume_ttl_s * 1000))
        return cls(max(1, int(lease_s * 1000)), ttl_ms, max(ttl_ms, int(IDLE_TTL_S * 1000)))

    @property
    def beat_s(self) -> float:
        """Between two beats, seconds."""
        return self.lease_ms / 1000 / BEATS

    @property
    def reader_ms(self) -> int:
        """For which a server may be silent about its readers."""
        return self.lease_ms * READ_BEATS // BEATS


class Beats:
    """The beats of one process's log; `run` beats. Belongs to one event loop.

    Args:
        log: whose.
    """

    def __init__(self, log: "ValkeyLog") -> None:
        self._log = log
        self._read: dict[str, ServedStream] = {}  # with readers here, where that matters, by id
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Beat until cancelled, through every loss of the store."""
        number = 0
        while True:
            await asyncio.sleep(self._log.times.beat_s)
            number += 1
            try:
                await self._beat()
                if number % (READ_BEATS // 4) == 0 and self._read:
                    self._tell_readers(list(self._read))
            except LogUnavailable as error:
                logger.debug("a beat is lost: %s", error)

    async def close(self) -> None:
        """End what runs."""
        await end_tasks(*self._tasks)

    def note_readers(self, stream: ServedStream) -> None:
        """Tell the store that a stream has a reader here, or none any more.

        For a stream that is to be cancelled when its last reader is gone.
        """
        if stream.num_readers:
            self._read[stream.id] = stream
            self._tell_readers([stream.id])
        elif self._read.pop(stream.id, None) is not None and not stream.has_terminal:
            self._spawn(self._leave(stream))

    async def _beat(self) -> None:
        log = self._log
        works = [work for work in log.works.values() if not work.is_lost]  # else it takes it back
        kept, followed = list(log.kept), log.copies.ids
        if not (works or kept or followed):
            return
        ids = [*(work.stream_id for work in works), *kept, *followed]
        answers = await log.store.script(
            scripts.BEAT,
            *(log.keys.prefix, log.holder),
            *(log.times.lease_ms, log.times.idle_ms, log.times.reader_ms),
            *(len(works), len(kept)),
            *ids,
            patience_s=log.times.lease_ms / 1000,
        )
        if not isinstance(answers, list) or len(answers) != len(ids):
            raise LogUnavailable(f"the log at {log.store.address} answers {answers!r:.100}")
        for work, answer in zip(works, answers, strict=False):
            self._note_work(work, answer)
        is_settled = log.store.healthy_s * 1000 > log.times.lease_ms
        for stream_id, answer in zip(kept, answers[len(works) :], strict=False):
            log.copies.note_kept(stream_id, has_worker=answer == 0, is_settled=is_settled)
            if answer == 2 and (stream := log.kept.get(stream_id)) is not None:
                stream.cancel_here()
        for stream_id, answer in zip(followed, answers[len(works) + len(kept) :], strict=True):
            log.copies.note_look(stream_id, answer, is_settled=is_settled)

    def _note_work(self, work: ValkeyWork, answer: Reply) -> None:
        if self._log.works.get(work.stream_id) is not work:
            return  # it has ended meanwhile
        if answer == 0:
            work.note_lost()
        elif answer == 2:
            work.note_cancel()
        elif answer == 3:
            self._spawn(self._put_back(work))

    async def _put_back(self, work: ValkeyWork) -> None:
        if not await work.put_back():
            work.note_lost()

    async def _leave(self, stream: ServedStream) -> None:
        log = self._log
        was_last = await log.store.script(
            scripts.LEAVE,
            *(log.keys.prefix, stream.id, log.holder, log.times.reader_ms),
            patience_s=log.times.lease_ms / 1000,
        )
        if was_last and not stream.num_readers:
            stream.cancel()

    def _tell_readers(self, ids: list[str]) -> None:
        log = self._log
        log.store.post_script(
            scripts.READ, log.keys.prefix, log.holder, 2 * log.times.reader_ms, *ids
        )

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(self._quietly(work), name="d2f-log-beat")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _quietly(self, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except LogUnavailable as error:
            logger.warning("what happens to a stream here reaches no other server: %s", error)
