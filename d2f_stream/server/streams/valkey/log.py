"""ValkeyLog: the streams of several servers, kept in a Valkey or Redis server.

Each process keeps copies of the streams that it works for or has readers of. Leases run by the
store's clock, so the clocks of the machines do not matter.
"""

import asyncio
import contextlib
import logging
import re
import secrets
from hashlib import blake2b
from typing import Final, Self

from d2f_stream.channels.ending import end_tasks
from d2f_stream.core.errors import LogUnavailable, StreamLost
from d2f_stream.core.events import StreamFailed, StreamFinished
from d2f_stream.core.identity import ModelIdentity
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.streams.log import check_model
from d2f_stream.server.streams.served_stream import ServedStream
from d2f_stream.server.streams.shelf import Shelf
from d2f_stream.server.streams.valkey import scripts
from d2f_stream.server.streams.valkey.beats import Beats, Times
from d2f_stream.server.streams.valkey.copies import Copies
from d2f_stream.server.streams.valkey.keys import (
    Keys,
    dict_of,
    encoded,
    events_of,
    fields_of,
    model_in,
    stream_of,
)
from d2f_stream.server.streams.valkey.news import News
from d2f_stream.server.streams.valkey.scripts import LAYOUT, Script
from d2f_stream.server.streams.valkey.store import Argument, Reply, Store
from d2f_stream.server.streams.valkey.work import ValkeyWork
from d2f_stream.wire.protocol import REQUEST_ID, Generate, RequestRejected

__all__ = ["ValkeyLog"]

logger = logging.getLogger("d2f_stream.server")

STREAM_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
LEASE_S: Final = 2.0
RELEASE_S: Final = 1.0
PATIENCE_S: Final = 5.0
"""For a store that does not answer a request; streams that run are more patient."""


class ValkeyLog:
    """A `StreamLog` in a store that other processes share; an async context manager.

    Args:
        url: valkey://[user:password@]host[:port][/database], or valkeys:// with TLS.
        limits: how long, and how much of what has ended is kept.
        lease_s: for which a worker may be silent, until others may take its streams over, seconds.

    Raises:
        InvalidRequest: the URL cannot be used.
        MissingExtra: valkey is not installed.

    Attributes:
        holder: this process, as the holder of leases.
        works: the leases that it holds, by stream id.
        name: of the log, alike for all whose URL names the same host, port and database.
        kept: its streams that no worker has yet, by id.
        copies: the streams that others work for.
    """

    outlives = True

    def __init__(self, url: str, limits: ServeLimits, *, lease_s: float = LEASE_S) -> None:
        self.holder = secrets.token_hex(8)
        self.store = Store(url)
        self.keys = Keys(f"d2f:{self.store.database}")
        self.name = blake2b(self.store.address.encode(), digest_size=8).hexdigest()
        self.limits = limits
        self.times = Times.of(lease_s, limits.resume_ttl_s)
        self._news = News(self.store.pool, on_message=self._note_news, on_back=self._note_back)
        self.copies = Copies(self.store, self.keys, self._news)
        self._shelf = Shelf(limits)
        self.works: dict[str, ValkeyWork] = {}  # by stream id
        self.kept: dict[str, ServedStream] = {}  # of ours, until a worker has them, by id
        self._beats = Beats(self)
        self._loops: list[asyncio.Task[None]] = []

    def __len__(self) -> int:
        return len(self._shelf)

    async def __aenter__(self) -> Self:
        """Connect. Safe to cancel.

        Raises:
            LogUnavailable: the log cannot be reached or used.
        """
        await self.store.open()
        try:
            version = await self.store.run(
                "SET", self.keys.version, LAYOUT, "NX", "GET", patience_s=PATIENCE_S
            )
            if version not in (None, LAYOUT.encode()):
                raise LogUnavailable(
                    f"the log at {self.store.address} is of another version of d2f_stream "
                    f"(layout {_text(version)!r}, here {LAYOUT!r}); give each its own database"
                )
            for loop in (self._news.run(), self._beats.run()):
                self._loops.append(asyncio.create_task(loop, name="d2f-log"))
            await self._news.subscribe(self.keys.holder(self.holder))
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Send what was posted, and disconnect."""
        await end_tasks(*self._loops)
        await self._beats.close()
        await self.copies.close()
        await self.store.close()

    async def create(
        self, request: Generate, *, client: str, asker: str, clamp: bool
    ) -> tuple[ServedStream, bool]:
        """Return the stream of the client's request, and whether it was made just now."""
        stream = ServedStream(request, client=client, asker=asker, clamp=clamp)
        answer = await self._script(
            scripts.CREATE,
            stream.id,
            self.keys.request(request.request_id, client),
            f"?{self.holder}",
            *(self.times.lease_ms, self.times.idle_ms),
            *fields_of(stream, request, self.keys),
            *("ttl_ms", self.times.ttl_ms, "idle_ms", self.times.idle_ms),
            *("most_bytes", self.limits.max_retained_bytes),
        )
        stream_id = _text(answer)
        if stream_id == stream.id:
            self.kept[stream.id] = stream
            self._add(stream)
            return stream, True
        return await self.find(stream_id, client=client), False

    async def of_request(self, request_id: str, *, client: str) -> ServedStream | None:
        """Return the stream that the client's request started; None where there is none."""
        if REQUEST_ID.fullmatch(request_id) is None:
            return None
        known = self._shelf.of_request(request_id, client=client)
        if known is not None:
            await self.follow(known)
            return known
        stream_id = await self.store.run(
            "GET", self.keys.request(request_id, client), patience_s=PATIENCE_S
        )
        return None if stream_id is None else await self._load(_text(stream_id))

    async def find(self, stream_id: str, *, client: str) -> ServedStream:
        """Return the client's stream, with all that the log has of it now."""
        stream = self._shelf.peek(stream_id)
        if stream is not None:
            await self.follow(stream)
        elif STREAM_ID.fullmatch(stream_id):
            stream = await self._load(stream_id)
        if stream is None or stream.client != client:
            return self._shelf.find(stream_id, client=client)  # says that there is none
        return stream

    async def work(
        self, stream_id: str, *, model: ModelIdentity | None = None, by_force: bool = False
    ) -> ValkeyWork | None:
        """Take the stream's lease; None where another worker has it, or the stream has ended."""
        if stream_id in self.works:
            if not by_force:
                return None
            self.works.pop(stream_id).note_lost()
        taken = await self._script(
            scripts.TAKE,
            *(stream_id, self.holder, self.times.lease_ms, int(by_force)),
            *((model.digest, model.name) if model is not None else ("", "")),
        )
        check_model(model_in(taken), model)
        if taken == -1:
            raise StreamLost(f"the log at {self.store.address} has no stream {stream_id[:64]!r}")
        if taken == 0:
            return None
        record, entries = await self._read(stream_id)
        fields, events = dict_of(record), events_of(entries)
        copy = self._shelf.peek(stream_id)
        if copy is not None:
            for event in events:
                copy.append(event)
        if not fields or (events and isinstance(events[-1], StreamFinished | StreamFailed)):
            self.store.post_script(scripts.RELEASE, self.keys.prefix, stream_id, self.holder)
            return None
        self.copies.leave(stream_id)
        self.kept.pop(stream_id, None)
        work = self.works[stream_id] = ValkeyWork(self, stream_id, fields, events, copy=copy)
        if taken == 2:
            work.note_cancel()
        return work

    async def begun_by(self, stream_id: str) -> ModelIdentity | None:
        """Return the model that has begun with the answer."""
        key = self.keys.record(stream_id)
        return model_in(await self._run("HMGET", key, "model", "model_name"))

    async def release(self, work: ValkeyWork) -> None:
        """Give the lease of a stream back; called by its holder. Without the store it runs out."""
        work.is_lost = True
        is_held = self.works.get(work.stream_id) is work
        if is_held:
            del self.works[work.stream_id]
        if is_held and not work.has_ended:
            arguments = self._of(work.stream_id, self.holder)
            with contextlib.suppress(LogUnavailable):
                await self.store.script(scripts.RELEASE, *arguments, patience_s=RELEASE_S)

    async def follow(self, stream: ServedStream) -> None:
        """Have this process's copy grow by what others append, until its end. Idempotent."""
        if stream.id not in self.works or self.works[stream.id].copy is not stream:
            await self.copies.follow(stream)

    async def wait_free(self, stream: ServedStream, *, is_given: bool = False) -> None:
        """Wait until the stream has ended, or nobody holds its lease any more. Safe to cancel."""
        await self.copies.wait_free(stream, is_given=is_given)

    def retain(self, stream: ServedStream) -> None:
        """Keep this process's copy of a stream that has ended: the store has it anyway."""
        self.kept.pop(stream.id, None)
        self.copies.leave(stream.id)
        if stream.has_terminal:
            self._shelf.retain(stream)
        else:
            self._shelf.forget(stream)

    def forget(self, stream: ServedStream) -> None:
        """Let a stream be found no more: its request may come again. Idempotent."""
        self.retain(stream)
        why = stream.error or StreamLost("the request was turned away")
        message = encoded(RequestRejected.of(why, request_id=stream.request_id))
        key = self.keys.request(stream.request_id, stream.client)
        self.store.post_script(scripts.FORGET, *self._of(stream.id, self.holder, key, message))

    def _add(self, stream: ServedStream) -> None:
        """Let a copy be found, and have what is done to it here reach the others."""
        stream.cancels_elsewhere(
            lambda: self.store.post_script(scripts.CANCEL, *self._of(stream.id))
        )
        if stream.cancels_on_disconnect:
            stream.on_readers = self._beats.note_readers
        self._shelf.add(stream)

    async def _load(self, stream_id: str) -> ServedStream | None:
        """Return a copy of a stream that keeps up with it; None where there is none."""
        record, entries = await self._read(stream_id)
        stream = self._shelf.peek(stream_id) or stream_of(stream_id, record, entries)
        if stream is not None and self._shelf.peek(stream_id) is None:
            self._add(stream)
            if stream.has_terminal:
                stream.end()
                self._shelf.retain(stream)
        if stream is not None:
            await self.follow(stream)
        return stream

    async def _read(self, stream_id: str) -> tuple[Reply, Reply]:
        record, entries = await asyncio.gather(
            self._run("HGETALL", self.keys.record(stream_id)),
            self._run("XRANGE", self.keys.events(stream_id), "-", "+"),
        )
        return record, entries

    async def _run(self, *command: Argument) -> Reply:
        return await self.store.run(*command, patience_s=PATIENCE_S)

    async def _script(self, script: Script, *arguments: Argument) -> Reply:
        return await self.store.script(script, *self._of(*arguments), patience_s=PATIENCE_S)

    def _of(self, *arguments: Argument) -> tuple[Argument, ...]:
        return (self.keys.prefix, *arguments)

    def _note_back(self) -> None:
        self.store.post("SET", self.keys.version, LAYOUT, "NX")  # it may have come back empty
        self.copies.note_back()

    def _note_news(self, channel: str, data: bytes) -> None:
        kind, _, name = channel.removeprefix(f"{self.keys.prefix}:").partition(":")
        if kind == "n":
            self.copies.note_message(name, data)
            return
        stream_id = data.decode()  # of ours, and cancelled
        if (work := self.works.get(stream_id)) is not None:
            work.note_cancel()
        elif (stream := self.kept.get(stream_id)) is not None:
            stream.cancel_here()


def _text(answer: Reply) -> str:
    return answer.decode() if isinstance(answer, bytes) else str(answer)
