"""MemoryLog: the streams of one server, kept in its own memory. The default."""

from collections.abc import Callable, Sequence
from typing import Self

from d2f_stream.core.errors import StreamLost
from d2f_stream.core.events import Event, StreamNames
from d2f_stream.core.identity import ModelIdentity
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.streams.log import check_model
from d2f_stream.server.streams.served_stream import ServedStream
from d2f_stream.server.streams.shelf import Shelf
from d2f_stream.wire.protocol import Generate

__all__ = ["MemoryLog"]


class MemoryLog:
    """A `StreamLog` that dies with its process. Belongs to one event loop; never waits.

    Args:
        limits: how long, and how much of what has ended is kept.
    """

    def __init__(self, limits: ServeLimits) -> None:
        self._shelf = Shelf(limits)
        self._works: dict[str, _Work] = {}  # by stream id

    outlives = False
    name = ""

    def __len__(self) -> int:
        return len(self._shelf)

    async def create(
        self, request: Generate, *, client: str, asker: str, clamp: bool
    ) -> tuple[ServedStream, bool]:
        """Return the stream of the client's request, and whether it was made just now."""
        known = self._shelf.of_request(request.request_id, client=client)
        if known is not None:
            return known, False
        stream = ServedStream(request, client=client, asker=asker, clamp=clamp)
        self._shelf.add(stream)
        return stream, True

    async def of_request(self, request_id: str, *, client: str) -> ServedStream | None:
        """Return the stream that the client's request started; None where there is none."""
        return self._shelf.of_request(request_id, client=client)

    async def find(self, stream_id: str, *, client: str) -> ServedStream:
        """Return the client's stream of that id.

        Raises:
            StreamLost: there is none.
        """
        return self._shelf.find(stream_id, client=client)

    async def work(
        self, stream_id: str, *, model: ModelIdentity | None = None, by_force: bool = False
    ) -> "_Work | None":
        """Take the stream's lease; None where another worker has it, or the stream has ended.

        Raises:
            StreamLost: there is no such stream.
            OtherModel: another model has begun with the answer.
        """
        stream = self._shelf.peek(stream_id)
        if stream is None:
            raise StreamLost(f"there is no stream {stream_id[:64]!r}")
        if stream.has_terminal or (stream_id in self._works and not by_force):
            return None
        if stream.started:
            check_model(stream.model, model)
        stream.model = model or stream.model
        self._works[stream_id] = work = _Work(stream, self._works)
        return work

    async def begun_by(self, stream_id: str) -> ModelIdentity | None:
        """Return the model that has begun with the answer."""
        stream = self._shelf.peek(stream_id)
        return None if stream is None else stream.model

    async def follow(self, stream: ServedStream) -> None:
        """Nothing to do: there is one copy."""

    async def wait_free(self, stream: ServedStream, *, is_given: bool = False) -> None:
        """Wait until the stream has ended. Safe to cancel."""
        await stream.wait_terminal()

    def retain(self, stream: ServedStream) -> None:
        """Keep a stream that has ended until its time is over, or others need the room."""
        self._shelf.retain(stream)

    def forget(self, stream: ServedStream) -> None:
        """Let a stream be found no more: its request may come again. Idempotent."""
        self._shelf.forget(stream)


class _Work:
    """A worker's hold on a stream of this process."""

    def __init__(self, stream: ServedStream, works: "dict[str, _Work]") -> None:
        self._stream = stream
        self._works = works

    @property
    def stream_id(self) -> str:
        return self._stream.id

    @property
    def names(self) -> StreamNames:
        stream = self._stream
        return StreamNames(stream.id, stream.request_id, stream.client)

    @property
    def events(self) -> Sequence[Event]:
        return self._stream.log

    @property
    def is_lost(self) -> bool:
        return self._works.get(self._stream.id) is not self

    async def append(self, event: Event) -> bool:
        stream = self._stream
        if self.is_lost:
            return False
        return stream.append(event) or stream.has(event)

    def on_cancel(self, cancel: Callable[[], None]) -> None:
        self._stream.begin(cancel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        if not self.is_lost:
            del self._works[self._stream.id]
