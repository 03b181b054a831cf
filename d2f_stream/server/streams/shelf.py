"""Shelf: the streams of a server, found by their ids and requests, and kept a while when ended.

Whoever lost a connection can read on until then. What all ended streams take together is bounded;
where it is too much, the oldest of the client who has most go first.
"""

from d2f_stream.channels.patience import Patience
from d2f_stream.core.errors import StreamLost
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.streams.served_stream import ServedStream

__all__ = ["Shelf"]


class Shelf:
    """The streams that can be read. Belongs to one event loop.

    Args:
        limits: how long, and how much of what has ended is kept.
    """

    def __init__(self, limits: ServeLimits) -> None:
        self._limits = limits
        self._streams: dict[str, ServedStream] = {}
        self._requests: dict[tuple[str, str], ServedStream] = {}  # by client and request id
        self._ended: dict[str, _Ended] = {}  # by client
        self._expiries: dict[str, Patience] = {}  # by stream id

    def __len__(self) -> int:
        return len(self._streams)

    def add(self, stream: ServedStream) -> None:
        """Let a stream be found."""
        self._streams[stream.id] = stream
        self._requests[stream.client, stream.request_id] = stream

    def of_request(self, request_id: str, *, client: str) -> ServedStream | None:
        """Return the stream that the client's request started; None where there is none."""
        return self._requests.get((client, request_id))

    def peek(self, stream_id: str) -> ServedStream | None:
        """Return the stream of that id, whosoever it is; None where there is none."""
        return self._streams.get(stream_id)

    def find(self, stream_id: str, *, client: str) -> ServedStream:
        """Return the client's stream of that id.

        Raises:
            StreamLost: there is none.
        """
        stream = self._streams.get(stream_id)
        if stream is None or stream.client != client:
            raise StreamLost(
                f"the server has no stream {stream_id[:64]!r}: it was restarted, or the stream "
                f"ended more than {self._limits.resume_ttl_s:g} s ago; ask again"
            )
        return stream

    def retain(self, stream: ServedStream) -> None:
        """Keep a stream that has ended until its time is over, or others need the room."""
        self._expiries[stream.id] = Patience(self._limits.resume_ttl_s, self.forget, stream)
        self._ended.setdefault(stream.client, _Ended()).add(stream)
        limit = self._limits.max_retained_bytes
        while sum(ended.num_bytes for ended in self._ended.values()) > limit:
            most = max(self._ended.values(), key=lambda ended: ended.num_bytes)
            self.forget(next(iter(most.streams)))

    def forget(self, stream: ServedStream) -> None:
        """Let a stream be found no more. Idempotent."""
        if (ended := self._ended.get(stream.client)) is not None:
            ended.discard(stream)
            if not ended.streams:
                del self._ended[stream.client]
        if (expiry := self._expiries.pop(stream.id, None)) is not None:
            expiry.cancel()  # or the timer would hold the log until it is due
        if self._streams.pop(stream.id, None) is not None:
            del self._requests[stream.client, stream.request_id]


class _Ended:
    """The streams of one client that have ended and are kept, the oldest first."""

    def __init__(self) -> None:
        self.streams: dict[ServedStream, int] = {}
        self.num_bytes = 0

    def add(self, stream: ServedStream) -> None:
        self.streams[stream] = num_bytes = stream.num_bytes
        self.num_bytes += num_bytes

    def discard(self, stream: ServedStream) -> None:
        self.num_bytes -= self.streams.pop(stream, 0)
