"""Exchange: the requests of one client behind a broker, and what is said about them.

Everything that is sent may be sent twice and everything that comes may come twice: workers know a
request by its id, and a stream's reader drops the events that it has by their seq.

What is sent again when the broker or a worker was away: requests that have not started, as they
are; streams that have, as a `resume` to their worker from the last event on. The first worker that
starts a request runs it; another that starts it too is told to cancel.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Final

from d2f_stream.channels.broker import Incoming, Outgoing
from d2f_stream.channels.mqtt import BrokerLink
from d2f_stream.client.mqtt_nodes import Nodes
from d2f_stream.client.mqtt_request import RemoteRequest
from d2f_stream.core.buffer import EventBuffer
from d2f_stream.core.errors import (
    D2FError,
    LimitExceeded,
    MessageTooLarge,
    RemoteError,
    Unauthorized,
    WorkerLost,
    error_from,
)
from d2f_stream.core.events import (
    Block,
    Draft,
    Event,
    StreamFailed,
    StreamFinished,
    StreamNames,
    StreamStarted,
)
from d2f_stream.core.session import Session
from d2f_stream.wire.codec import Codec
from d2f_stream.wire.protocol import Cancel, Generate, Operation, RequestRejected, Resume
from d2f_stream.wire.topics import OperationTopic, RequestTopic, StreamTopic, Topic, codec_of

__all__ = ["Exchange"]

CANCEL_GRACE_S: Final = 5.0
"""So long a cancelled stream waits for its worker's last events."""

LOSS_GRACE_S: Final = 1.0
"""So long the last events of a worker may come after the news that it is gone."""

MAX_REQUEST_BYTES: Final = 512 * 1024

MAX_REMEMBERED: Final = 1024
"""Requests that are over, remembered so that a second worker's late start can be cancelled."""


class Exchange:
    """The requests that are not over. Belongs to one event loop.

    Attributes:
        link: to the broker; must be set before the first request.

    Args:
        client: our name in the topics.
        codec: of what is sent.
        nodes: the workers.
        on_idle: called when the last request is over.
    """

    def __init__(
        self, client: str, codec: Codec, nodes: Nodes, *, on_idle: Callable[[], None]
    ) -> None:
        self.link: BrokerLink | None = None
        self._client, self._codec, self._nodes = client, codec, nodes
        self._on_idle = on_idle
        self._requests: dict[str, RemoteRequest] = {}  # by request id
        self._over: OrderedDict[str, str | None] = OrderedDict()  # request id -> stream id

    @property
    def num_requests(self) -> int:
        """Requests that are not over."""
        return len(self._requests)

    def ask(self, request: Generate, names: StreamNames | None = None) -> Session:
        """Send a request; the session reads its stream.

        Raises:
            MessageTooLarge: it is larger than brokers usually allow.
        """
        size = len(self._codec.encode(request))
        if size > MAX_REQUEST_BYTES:  # a broker would disconnect us, and again at each repetition
            raise MessageTooLarge(
                f"the request has {size} bytes but the limit over MQTT is {MAX_REQUEST_BYTES}; "
                "shorten the prompt"
            )
        cancel = partial(self._cancel, request.request_id)
        buffer = EventBuffer(cancel=cancel, pause=_go_on, resume=_go_on)
        self._requests[request.request_id] = record = RemoteRequest(request, buffer, names)
        self._send_request(record)
        return Session(buffer)

    def recover(self, node: str | None = None, *, unstarted: bool = True) -> None:
        """Send again what may be lost: for the streams of one worker or all, and for requests."""
        for record in self._requests.values():
            concerned = node in (None, record.node) if record.stream.started else unstarted
            if concerned:
                self._recover(record)

    def note(self, request_id: str, message: Incoming) -> None:
        """Take what a worker says about a request.

        Raises:
            ProtocolError: it cannot be read.
        """
        node = message.notes.get("node", "")
        record = self._requests.get(request_id)
        match codec_of(message.content_type).decode_message(message.payload):
            case StreamStarted() | Block() | Draft() | StreamFinished() | StreamFailed() as event:
                if record is not None:
                    self._receive(record, event, node)
                else:
                    self._note_late(request_id, event, node)
            case RequestRejected() as rejected if record is not None:
                self._note_rejected(record, rejected)
            case _:
                pass

    def note_refused(self, message: Outgoing, reason: str) -> None:
        """End the request that the broker does not take."""
        operation = codec_of(message.content_type).decode_operation(message.payload)
        if isinstance(operation, Generate) and operation.request_id in self._requests:
            text = f"the broker does not let {self._client!r} publish to {message.topic}: {reason}"
            kind = Unauthorized if "authori" in reason.lower() else RemoteError
            self._fail(self._requests[operation.request_id], kind(text))

    def note_gone(self, node: str) -> None:
        """Give up the streams of a worker, and ask others for what it may not have started."""
        loop = asyncio.get_running_loop()
        loop.call_later(LOSS_GRACE_S, self._lose_streams, node)  # their ends may be on the way
        for record in self._requests.values():
            if not record.stream.started:
                self._send_request(record)

    def fail(self, problem: D2FError, *, started: bool = True) -> None:
        """End the requests with an error: all, or those that have not started."""
        for record in list(self._requests.values()):
            if started or not record.stream.started:
                self._fail(record, problem)

    def abandon(self, problem: D2FError) -> None:
        """Cancel all requests at their workers, and end them with an error."""
        for record in list(self._requests.values()):
            self._send_cancel(record)
            self._fail(record, problem)

    # What comes.

    def _receive(self, record: RemoteRequest, event: Event, node: str) -> None:
        if record.stream.started and event.stream != record.stream.stream_id:
            if isinstance(event, StreamStarted):
                self._cancel_other(record.request_id, event.stream, node)
            return
        complete = record.receive(event)
        if record.node is None and record.stream.started and node:
            record.node = node
            self._nodes.expect(node)
            if self._nodes.is_gone(node):
                self.note_gone(node)
        if record.stream.ended:
            self._forget(record)
        elif not complete:
            self._send_resume(record, event.stream, node)

    def _note_late(self, request_id: str, event: Event, node: str) -> None:
        """Cancel what another worker starts for a request that is over."""
        is_start = isinstance(event, StreamStarted) and request_id in self._over
        if is_start and event.stream != self._over[request_id]:
            self._cancel_other(request_id, event.stream, node)

    def _note_rejected(self, record: RemoteRequest, rejected: RequestRejected) -> None:
        stream_id = record.stream.stream_id
        if stream_id is not None and rejected.stream != stream_id:
            return  # a second worker refuses what the first has begun
        if rejected.code == "shutting_down" and stream_id is None and record.may_bounce():
            self._send_request(record)  # it takes no more, but another may
            return
        problem = error_from(rejected.code, rejected.message)
        if isinstance(problem, LimitExceeded):
            problem.retry_after_s = rejected.retry_after_s
        self._fail(record, problem)

    def _cancel(self, request_id: str) -> None:
        record = self._requests.get(request_id)
        if record is None:
            return
        self._send_cancel(record)
        if not record.stream.started:
            self._end_cancelled(request_id)
            return
        loop = asyncio.get_running_loop()
        record.deadline = loop.call_later(CANCEL_GRACE_S, self._end_cancelled, request_id)

    def _end_cancelled(self, request_id: str) -> None:
        record = self._requests.get(request_id)
        if record is not None:
            record.stream.end_cancelled()
            self._forget(record)

    def _fail(self, record: RemoteRequest, problem: D2FError) -> None:
        record.stream.fail(problem)
        self._forget(record)

    def _forget(self, record: RemoteRequest) -> None:
        if record.deadline is not None:
            record.deadline.cancel()
        for kind in ("generate", "resume"):
            self._connection.withdraw((kind, record.request_id))
        self._requests.pop(record.request_id, None)
        self._over[record.request_id] = record.stream.stream_id
        if len(self._over) > MAX_REMEMBERED:
            self._over.popitem(last=False)
        if not self._requests:
            self._on_idle()

    def _lose_streams(self, node: str) -> None:
        if self._nodes.is_gone(node):
            problem = WorkerLost(f"the worker {node} that ran the stream is gone")
            for record in list(self._requests.values()):
                if record.node == node:
                    self._fail(record, problem)

    # What is sent.

    def _recover(self, record: RemoteRequest) -> None:
        """Send what brings the request on after something on the way may be lost."""
        stream_id = record.stream.stream_id
        if stream_id is None:
            self._send_request(record)
            return
        if record.deadline is not None:
            self._send_cancel(record)
        record.asked_after = None
        self._send_resume(record, stream_id, record.node or "")

    def _send_request(self, record: RemoteRequest) -> None:
        if self._nodes.card is not None:  # or nobody would take it
            key = ("generate", record.request_id)
            self._post(key, RequestTopic(self._client), record.stream.request)

    def _send_resume(self, record: RemoteRequest, stream_id: str, node: str) -> None:
        after_seq = record.stream.last_seq
        if record.asked_after != after_seq and node:
            record.asked_after = after_seq
            drafts = record.stream.request.params.drafts is True
            resume = Resume(stream=stream_id, after_seq=after_seq, drafts=drafts)
            topic = OperationTopic(node, self._client, record.request_id)
            self._post(("resume", record.request_id), topic, resume)

    def _send_cancel(self, record: RemoteRequest) -> None:
        stream_id, request_id = record.stream.stream_id, record.request_id
        if stream_id is not None and record.node:
            self._cancel_other(request_id, stream_id, record.node)
            return
        topic = StreamTopic(self._client, request_id, "cancel")
        self._post(("cancel", request_id), topic, Cancel(request_id=request_id))

    def _cancel_other(self, request_id: str, stream_id: str, node: str) -> None:
        if node:
            topic = OperationTopic(node, self._client, request_id)
            self._post(("cancel", stream_id), topic, Cancel(stream=stream_id))

    def _post(self, key: tuple[str, str], topic: Topic, operation: Operation) -> None:
        data = self._codec.encode(operation)
        self._connection.post(
            key, Outgoing(str(topic), data, content_type=self._codec.content_type)
        )

    @property
    def _connection(self) -> BrokerLink:
        assert self.link is not None, "a request before there was a link"
        return self.link


def _go_on() -> None:
    """Pause or resume nothing: the answer's own length bounds what waits for its reader."""
