"""The MQTT topics and the two payloads that only MQTT has. Pure; knows no broker.

    d2f/v1/requests/{client}                          in   generate; workers share it
    d2f/v1/clients/{client}/{request_id}/cancel       in   cancel, to every worker
    d2f/v1/nodes/{node}/operations/{client}/{request_id}
                                                      in   cancel and resume, to one worker
    d2f/v1/clients/{client}/{request_id}/events       out  durable events, in order
    d2f/v1/clients/{client}/{request_id}/state        out  StreamState, retained
    d2f/v1/clients/{client}/{request_id}/drafts       out  drafts, QoS 0
    d2f/v1/nodes/{node}/status                        out  NodeStatus, retained; the worker's will

A broker does not tell who published a message, so every topic that a client writes names the
client: the broker's access rules can hold each to its own name, and a worker may believe it. The
request id stands in the topic of an operation so that a refusal has a topic to go to.
"""

import re
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

import msgspec
from msgspec import Struct

from d2f_stream.core.errors import InvalidRequest, ProtocolError
from d2f_stream.core.events import StreamFailed, StreamFinished
from d2f_stream.wire.codec import JSON, MSGPACK, UNREADABLE, Codec, problem_of
from d2f_stream.wire.protocol import ServerHello, check_request_id

__all__ = [
    "CANCELS",
    "GROUP",
    "STATUSES",
    "UNREADABLE_REQUEST",
    "NodeStatus",
    "NodeStatusTopic",
    "OperationTopic",
    "RequestTopic",
    "StreamState",
    "StreamTopic",
    "Topic",
    "check_name",
    "codec_of",
    "decode",
    "encode",
    "operations_of",
    "parse",
    "requests_of",
    "streams_of",
]

ROOT: Final = "d2f/v1"
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@:=-]{0,127}")

GROUP: Final = "d2f"
"""The usual name of the group of workers among which the broker shares the requests."""

CANCELS: Final = f"{ROOT}/clients/+/+/cancel"
"""What every worker subscribes to, since a request that has not started has no node yet."""

STATUSES: Final = f"{ROOT}/nodes/+/status"
"""What clients subscribe to."""

UNREADABLE_REQUEST: Final = "unreadable-request"
"""Stands for the id of a request that cannot be read: its rejection needs a topic."""

StreamKind = Literal["events", "state", "drafts", "cancel"]
STREAM_KINDS: Final[tuple[StreamKind, ...]] = ("events", "state", "drafts", "cancel")


class NodeStatus(Struct, frozen=True, kw_only=True, tag="node.status"):
    """Whether a worker serves; retained, and the broker publishes the offline one as its will.

    Attributes:
        node: its name, new with every start of the worker.
        status: "closing" takes no more requests but ends its streams; "offline" has none any more.
        connection: number of times that the worker has connected to the broker. When it changes,
            messages may have been lost on the way to the worker and from it.
        ttl_s: seconds without news after which the worker counts as offline.
        hello: what it serves; None when offline.
        log: name of the log that it shares with others: once it is gone, any of them reads its
            streams on, and goes on with them. "" where they end with it.
    """

    node: str
    status: Literal["online", "closing", "offline"]
    connection: int = 0
    ttl_s: float = 90.0
    hello: ServerHello | None = None
    log: str = ""


class StreamState(Struct, frozen=True, kw_only=True, tag="stream.state"):
    """A stream so far, for whoever comes late: skip the events up to `last_seq`, then read on.

    Attributes:
        stream: its id.
        request_id: the client's name for it.
        node: the worker that runs it, which takes cancel and resume.
        last_seq: of the last event that `text` contains.
        text: what was committed.
        terminal: how it ended, once it has.
    """

    stream: str
    request_id: str
    node: str
    last_seq: int
    text: str
    terminal: StreamFinished | StreamFailed | None = None


Payload = TypeVar("Payload", NodeStatus, StreamState)


@dataclass(frozen=True, slots=True)
class RequestTopic:
    """Where a client publishes its requests."""

    client: str

    def __post_init__(self) -> None:
        check_name("client", self.client)

    def __str__(self) -> str:
        return f"{ROOT}/requests/{self.client}"


@dataclass(frozen=True, slots=True)
class StreamTopic:
    """What belongs to one request of a client."""

    client: str
    request_id: str
    kind: StreamKind

    def __post_init__(self) -> None:
        check_name("client", self.client)
        check_request_id(self.request_id)

    def __str__(self) -> str:
        return f"{ROOT}/clients/{self.client}/{self.request_id}/{self.kind}"


@dataclass(frozen=True, slots=True)
class OperationTopic:
    """Where a client tells one worker what to do with a stream."""

    node: str
    client: str
    request_id: str

    def __post_init__(self) -> None:
        check_name("node", self.node)
        check_name("client", self.client)
        check_request_id(self.request_id)

    def __str__(self) -> str:
        return f"{ROOT}/nodes/{self.node}/operations/{self.client}/{self.request_id}"


@dataclass(frozen=True, slots=True)
class NodeStatusTopic:
    """Where a worker says whether it serves."""

    node: str

    def __post_init__(self) -> None:
        check_name("node", self.node)

    def __str__(self) -> str:
        return f"{ROOT}/nodes/{self.node}/status"


Topic = RequestTopic | StreamTopic | OperationTopic | NodeStatusTopic


def parse(topic: str) -> Topic | None:
    """Return what a topic means; None for one that is not ours or holds a name that is refused."""
    if not topic.startswith(f"{ROOT}/"):
        return None
    levels = topic.removeprefix(f"{ROOT}/").split("/")
    try:
        match levels:
            case ["requests", client]:
                return RequestTopic(client)
            case ["clients", client, request_id, kind]:
                found = next((known for known in STREAM_KINDS if known == kind), None)
                return None if found is None else StreamTopic(client, request_id, found)
            case ["nodes", node, "status"]:
                return NodeStatusTopic(node)
            case ["nodes", node, "operations", client, request_id]:
                return OperationTopic(node, client, request_id)
            case _:
                return None
    except InvalidRequest:
        return None


def requests_of(group: str) -> str:
    """Return what the workers of a group subscribe to: each request reaches one of them.

    Raises:
        InvalidRequest: the name does not fit a topic.
    """
    check_name("group", group)
    return f"$share/{group}/{ROOT}/requests/+"


def streams_of(client: str, kind: StreamKind) -> str:
    """Return the filter of all topics of that kind of a client's requests.

    Raises:
        InvalidRequest: the name does not fit a topic.
    """
    check_name("client", client)
    return f"{ROOT}/clients/{client}/+/{kind}"


def operations_of(node: str) -> str:
    """Return the filter of all operations that are meant for a worker.

    Raises:
        InvalidRequest: the name does not fit a topic.
    """
    check_name("node", node)
    return f"{ROOT}/nodes/{node}/operations/+/+"


def check_name(kind: str, name: str) -> None:
    """Refuse a name of a client or node that could reach into another's topics.

    Raises:
        InvalidRequest: it is not 1 to 128 letters, digits or "_.@:=-", or begins with a sign.
    """
    if NAME.fullmatch(name) is None:
        shown = name if len(name) <= 40 else name[:40] + "..."
        raise InvalidRequest(
            f"the {kind} name is {shown!r} but must be 1 to 128 ASCII letters, digits or signs of "
            "'_.@:=-', beginning with a letter or digit, since it becomes a level of MQTT topics"
        )


def codec_of(content_type: str | None) -> Codec:
    """Return the encoding that a message's ContentType names; JSON where it names none."""
    return MSGPACK if content_type == MSGPACK.content_type else JSON


def encode(payload: NodeStatus | StreamState, codec: Codec = JSON) -> bytes:
    """Return the payload's bytes."""
    return msgspec.json.encode(payload) if codec is JSON else msgspec.msgpack.encode(payload)


def decode(data: bytes, kind: type[Payload], codec: Codec = JSON) -> Payload:
    """Read a payload.

    Raises:
        ProtocolError: it cannot be read.
    """
    try:
        if codec is JSON:
            return msgspec.json.decode(data, type=kind)
        return msgspec.msgpack.decode(data, type=kind)
    except UNREADABLE as error:
        problem = problem_of(error, data)
        raise ProtocolError(f"a {kind.__name__} cannot be read: {problem}") from error
