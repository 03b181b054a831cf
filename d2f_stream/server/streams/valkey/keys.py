"""Keys and channels of one database, and what a stream's record and events look like in it."""

from dataclasses import dataclass

import msgspec

from d2f_stream.core.errors import InvalidRequest, ProtocolError
from d2f_stream.core.events import Block, Event, StreamFailed, StreamFinished, StreamStarted
from d2f_stream.core.identity import ModelIdentity
from d2f_stream.server.streams.served_stream import ServedStream
from d2f_stream.server.streams.valkey.store import Reply
from d2f_stream.wire.codec import MSGPACK
from d2f_stream.wire.protocol import Generate, RequestRejected, ServerMessage

Fields = list[str | bytes | int]
"""Names and values in turn."""

__all__ = [
    "Fields",
    "Keys",
    "decoded",
    "dict_of",
    "encoded",
    "events_of",
    "fields_of",
    "model_in",
    "stream_of",
]


@dataclass(frozen=True, slots=True)
class Keys:
    """The names of what belongs to a stream; `scripts.py` tells what they hold."""

    prefix: str

    @property
    def version(self) -> str:
        """Of the layout."""
        return f"{self.prefix}:version"

    def record(self, stream_id: str) -> str:
        """Of the stream's record."""
        return f"{self.prefix}:s:{stream_id}"

    def request(self, request_id: str, client: str) -> str:
        """Of the id of the stream that a request started."""
        return f"{self.prefix}:r:{client}:{request_id}"

    def events(self, stream_id: str) -> str:
        """Of the stream's events."""
        return f"{self.prefix}:e:{stream_id}"

    def news(self, stream_id: str) -> str:
        """The channel of what comes in a stream."""
        return f"{self.prefix}:n:{stream_id}"

    def holder(self, holder: str) -> str:
        """The channel of who holds leases."""
        return f"{self.prefix}:h:{holder}"


def encoded(message: Event | RequestRejected) -> bytes:
    """Return what the log and its channels hold of an event."""
    return MSGPACK.encode(message)


def decoded(data: bytes) -> ServerMessage | None:
    """Return the event again; None where it is none that this version knows."""
    try:
        return MSGPACK.decode_message(data)
    except ProtocolError:
        return None


def fields_of(stream: ServedStream, request: Generate, keys: Keys) -> Fields:
    """Return a stream's record, names and values in turn.

    Raises:
        InvalidRequest: the request holds numbers that cannot be stored.
    """
    try:
        packed = msgspec.msgpack.encode(request)
    except (OverflowError, ValueError) as error:
        raise InvalidRequest(f"the request cannot be stored: {error}") from error
    fields: dict[str, str | bytes | int] = {
        "client": stream.client,
        "asker": stream.asker,
        "clamp": int(stream.clamp),
        "digest": stream.digest,
        "request": packed,
        "request_key": keys.request(request.request_id, stream.client),
    }
    if stream.cancels_on_disconnect:
        fields["leave"] = 1
    return [part for field in fields.items() for part in field]


def stream_of(stream_id: str, record: Reply, entries: Reply) -> ServedStream | None:
    """Return a copy of a stream as its record and its events tell it; None without a record."""
    fields = dict_of(record)
    if not fields:
        return None
    stream = ServedStream(
        msgspec.msgpack.decode(fields[b"request"], type=Generate),
        client=fields[b"client"].decode(),
        asker=fields[b"asker"].decode(),
        clamp=fields[b"clamp"] == b"1",
    )
    stream.id, stream.digest = stream_id, fields[b"digest"]
    for event in events_of(entries):
        stream.append(event)
    return stream


def dict_of(record: Reply) -> dict[bytes, bytes]:
    """Return what HGETALL answers, as names and values."""
    if not isinstance(record, list):
        return {}
    parts = [part for part in record if isinstance(part, bytes)]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def model_in(answer: Reply) -> ModelIdentity | None:
    """Return the model whose digest and name were answered; None where none was."""
    match answer:
        case [bytes(digest), bytes(name)]:
            return ModelIdentity(name.decode(), digest.decode())
    return None


def events_of(entries: Reply) -> list[Event]:
    """Return the events of what XRANGE answers."""
    found: list[Event] = []
    for entry in entries if isinstance(entries, list) else []:
        match entry:
            case [bytes(), [bytes(), bytes(data)]]:
                event = decoded(data)
                if isinstance(event, StreamStarted | Block | StreamFinished | StreamFailed):
                    found.append(event)
            case _:
                pass
    return found
