"""MqttGateway: the worker's side of MQTT. Takes requests from a broker, publishes their streams.

Knows topics and requests; the connection is a `BrokerLink`, what is published are `Publications`.
Handling a message waits for the log at most, so the broker's messages do not pile up here.

The client's name in a topic is believed. That the broker lets nobody use another's name is the
work of its access rules: see docs/mqtt.md.
"""

import asyncio
import contextlib
import logging
import math
import secrets
import ssl

from d2f_stream.channels.broker import BrokerAddress, Incoming, Outgoing
from d2f_stream.channels.ending import end_tasks
from d2f_stream.channels.mqtt import BrokerLink, Sleep
from d2f_stream.core.errors import (
    D2FError,
    InvalidRequest,
    MessageTooLarge,
    ProtocolError,
    StreamLost,
)
from d2f_stream.server.mqtt.node import STATUS_INTERVAL_S, Node
from d2f_stream.server.mqtt.publications import Publications
from d2f_stream.server.peer_log import PeerLog
from d2f_stream.server.streams.registry import StreamRegistry
from d2f_stream.wire.codec import Codec
from d2f_stream.wire.protocol import (
    REQUEST_ID,
    Cancel,
    Generate,
    RequestRejected,
    Resume,
    ServerHello,
)
from d2f_stream.wire.topics import (
    CANCELS,
    GROUP,
    UNREADABLE_REQUEST,
    OperationTopic,
    RequestTopic,
    StreamTopic,
    codec_of,
    operations_of,
    parse,
    requests_of,
)

__all__ = ["MqttGateway"]

logger = logging.getLogger("d2f_stream.mqtt")
log = PeerLog(logger)

WILL_DELAY_S = 10
SHARED_WILL_DELAY_S = 2
"""Where others read its streams on: should it come back after all, nothing comes twice."""
CLOSE_GRACE_S = 5.0
MAX_REJECTIONS = 64
"""That wait for the broker, of one client; a later one takes the place of the oldest."""


class MqttGateway:
    """Serves the streams of a registry over a broker.

    Belongs to one event loop. `run` connects; without it nothing is served.

    Args:
        registry: the streams.
        url: of the broker: mqtt://user:password@host:1883 or mqtts://...
        hello: what the worker says of itself.
        node: for people; a random part is added, since each start of a worker is another node.
            None is the host's name.
        group: the workers of a group share the requests; each group gets them all, so workers of
            one model belong to one group. Where clients are not trusted it must be hard to guess:
            a broker may give a request to whoever names the group, and so to nobody.
        tls: for mqtts://; None is Python's default context.
        will_delay_s: how long the broker waits for a worker that is gone without a word to come
            back, before it declares it offline and its streams are lost, or go on at others that
            share its log, whole seconds. None is 10, or 2 with such a log.
        sleep: waits between attempts to connect.

    Raises:
        InvalidRequest: the URL or a name cannot be used.
    """

    def __init__(
        self,
        registry: StreamRegistry,
        url: str,
        *,
        hello: ServerHello,
        node: str | None = None,
        group: str = GROUP,
        tls: ssl.SSLContext | None = None,
        will_delay_s: int | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.registry = registry
        if will_delay_s is None:
            will_delay_s = SHARED_WILL_DELAY_S if registry.shared_log else WILL_DELAY_S
        self._node = Node(node, hello, log=registry.shared_log)
        self._requests = requests_of(group)
        self._num_rejections = 0
        self._closing = False
        self._closed = asyncio.Event()
        self._expiry_s = max(1, math.ceil(registry.limits.resume_ttl_s))
        self._link = BrokerLink(
            BrokerAddress.parse(url),
            self,
            # Whoever connects by this name takes the worker's place, and nodes are known to all.
            identifier=f"d2f-worker-{secrets.token_hex(16)}",
            subscriptions=[(self._requests, 1), (CANCELS, 1), (operations_of(self._node.name), 1)],
            session_expiry_s=will_delay_s,
            tls=tls,
            will=self._node.status("offline"),
            will_delay_s=will_delay_s,
            farewell=lambda: self._node.status("offline"),
            sleep=sleep,
        )
        ttl_s = registry.limits.resume_ttl_s
        self._publications = Publications(self._link, node=self._node.name, ttl_s=ttl_s)

    @property
    def node(self) -> str:
        """The worker's name, as topics have it."""
        return self._node.name

    @property
    def connected(self) -> bool:
        """Whether there is a connection to the broker now."""
        return self._link.connected

    async def wait_connected(self) -> None:
        """Wait until requests can come in. Safe to cancel."""
        await self._link.wait_connected()

    async def run(self) -> None:
        """Serve until cancelled or closed, through every loss of the broker.

        When cancelled it tells the broker that this node is offline, and ends; its streams go on.
        """
        link = asyncio.create_task(self._link.run(), name="d2f-mqtt-link")
        beat = asyncio.create_task(self._announce(), name="d2f-mqtt-status")
        closed = asyncio.create_task(self._closed.wait(), name="d2f-mqtt-closed")
        try:
            await asyncio.wait((link, beat, closed), return_when=asyncio.FIRST_COMPLETED)
            if not closed.done():
                await asyncio.gather(link, beat)  # neither ends by itself: one has raised
        finally:
            await end_tasks(link, beat, closed, *self._publications.give_up())

    async def close(self, deadline_s: float) -> None:
        """Take no more requests, let the streams end, then say "offline" and end `run`.

        What still runs at the deadline is cancelled or, where others share the log, left to them.
        Safe to cancel; `run` then goes on.
        """
        self._closing = True
        self._post_status()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_GRACE_S):
                await self._link.unsubscribe([self._requests])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                await self._publications.wait_published()
        if not self.registry.shared_log:
            self._publications.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_GRACE_S if self.connected else 0.0):
                if not self.registry.shared_log:
                    await self._publications.wait_published()
                await self._link.flush()
        self._closed.set()

    # What the link tells.

    def on_connected(self) -> None:
        """Announce the node, and publish anew what the broker may have lost."""
        self._node.num_connections += 1
        self._post_status()
        self._publications.note_reconnect()

    def on_lost(self, reason: str, *, refused: bool) -> None:
        """Nothing to do: the logs keep what is to be published."""

    def on_refused(self, message: Outgoing, reason: str) -> None:
        """Nothing to do: the link logs it."""

    async def on_message(self, message: Incoming) -> None:
        """Do what a client asks, or refuse it."""
        topic = parse(message.topic)
        match topic:
            case RequestTopic(client):
                await self._refusing(topic, message, client, None)
            case OperationTopic(_, client, request_id):
                await self._refusing(topic, message, client, request_id)
            case StreamTopic(client, request_id, "cancel"):
                # Every worker gets it, and at most one has such a stream.
                with contextlib.suppress(StreamLost):
                    await self.registry.cancel(request_id, client=_principal(client))
            case _:
                log.info("a message to %s is dropped: it names no client", message.topic)

    async def _refusing(
        self, topic: RequestTopic | OperationTopic, message: Incoming, client: str, name: str | None
    ) -> None:
        codec = codec_of(message.content_type)
        stream_id: str | None = None
        try:
            limit = self.registry.limits.max_message_bytes
            if len(message.payload) > limit:
                raise MessageTooLarge(
                    f"the message has {len(message.payload)} bytes but this worker allows {limit}"
                )
            operation = codec.decode_operation(message.payload)
            match topic, operation:
                case RequestTopic(), Generate():
                    await self._generate(operation, client, codec)
                case OperationTopic(), Resume():
                    stream_id = operation.stream
                    await self._resume(operation, client, topic.request_id, codec)
                case OperationTopic(), Cancel():
                    stream_id = operation.stream
                    await self.registry.cancel(operation.name, client=_principal(client))
                case _:
                    raise ProtocolError(
                        "this topic takes no such operation: generate goes to requests/, cancel "
                        "and resume to nodes/.../operations/"
                    )
        except D2FError as error:
            name = name or _request_id_in(message.payload, codec) or UNREADABLE_REQUEST
            if name == UNREADABLE_REQUEST:
                log.info("a message of %s cannot be read: %s", client, error)
            self._reject(StreamTopic(client, name, "events"), error, stream_id, codec)

    async def _generate(self, request: Generate, client: str, codec: Codec) -> None:
        if request.on_disconnect != "continue":
            raise InvalidRequest(
                f"on_disconnect is {request.on_disconnect!r}, but over MQTT a worker does not see "
                "who is gone; make the request's cancel your last will instead"
            )
        stream = await self.registry.generate(request, client=_principal(client))
        drafts = request.params.drafts is True
        self._publications.publish(stream, client, codec, after_seq=-1, drafts=drafts)

    async def _resume(self, operation: Resume, client: str, request_id: str, codec: Codec) -> None:
        stream = await self.registry.resume(
            operation.stream, client=_principal(client), after_seq=operation.after_seq
        )
        if stream.request_id != request_id:
            raise InvalidRequest("the stream belongs to another request than the topic names")
        after_seq, drafts = operation.after_seq, operation.drafts
        self._publications.publish(stream, client, codec, after_seq=after_seq, drafts=drafts)

    def _reject(
        self, topic: StreamTopic, error: D2FError, stream_id: str | None, codec: Codec
    ) -> None:
        unnamed = stream_id or topic.request_id == UNREADABLE_REQUEST
        name = None if unnamed else topic.request_id
        rejection = RequestRejected.of(error, request_id=name, stream=stream_id)
        message = Outgoing(
            str(topic),
            codec.encode(rejection),
            content_type=codec.content_type,
            expiry_s=self._expiry_s,
            notes=(("node", self.node),),
        )
        # So many wait for each client, however many it asks for: others' must not be pushed out.
        self._num_rejections += 1
        key = ("rejection", topic.client, self._num_rejections % MAX_REJECTIONS)
        self._link.post(key, message)

    # What the node says of itself.

    async def _announce(self) -> None:
        while True:
            await asyncio.sleep(STATUS_INTERVAL_S)
            if self.connected:
                self._post_status()

    def _post_status(self) -> None:
        self._link.post("status", self._node.status("closing" if self._closing else "online"))


def _principal(client: str) -> str:
    return f"mqtt:{client}"


def _request_id_in(payload: bytes, codec: Codec) -> str | None:
    """Return the request id of a message that is wrong otherwise; None where it has no good one."""
    name, _ = codec.names_of(payload)
    return name if name is not None and REQUEST_ID.fullmatch(name) else None
