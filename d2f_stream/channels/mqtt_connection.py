"""BrokerClient: one connection to an MQTT 5 broker, through aiomqtt 2. Knows nothing of streams.

aiomqtt runs its client on the event loop, without a thread but for the connect itself. Four of its
habits shape this file:

- a `Client` that lost its connection keeps the future of its old one, so each attempt makes anew;
- its calls do not notice a lost connection while they wait for the broker's answer;
- a full queue of incoming messages drops what was already acknowledged: the queue here notes that
  and the link connects anew, which makes both sides resume;
- the reason in a PUBACK is not looked at, so a broker's refusal would pass for success.
"""

import asyncio
import contextlib
import math
import ssl
from collections.abc import Coroutine, Iterator
from typing import Any, Final, TypeVar

from d2f_stream.channels.broker import Incoming, LinkDown, Outgoing, Refused
from d2f_stream.core.errors import MissingExtra

try:
    import aiomqtt
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties
except ImportError as error:
    raise MissingExtra("MQTT", error.name or "aiomqtt", "mqtt") from error

__all__ = [
    "MAX_PUBLISHING",
    "BrokerClient",
    "Inbox",
    "incoming_of",
    "new_tls_context",
    "properties_of",
]

MAX_PUBLISHING: Final = 64
LEAVE_TIMEOUT_S: Final = 2.0

Answer = TypeVar("Answer")


class _TlsSocket(ssl.SSLSocket):
    """A socket that is closed when its handshake fails, which paho leaves to the collector."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except OSError:
            self.close()
            raise


def new_tls_context() -> ssl.SSLContext:
    """Return Python's default context, with sockets that are closed when a handshake fails."""
    context = ssl.create_default_context()
    context.sslsocket_class = _TlsSocket
    return context


class Inbox(asyncio.Queue[aiomqtt.Message]):
    """The queue of incoming messages, which tells that one did not fit."""

    overflowed = False

    def put_nowait(self, item: aiomqtt.Message) -> None:
        """Append a message, or note that it did not fit.

        Raises:
            asyncio.QueueFull: it did not; aiomqtt drops it.
        """
        try:
            super().put_nowait(item)
        except asyncio.QueueFull:
            self.overflowed = True
            raise


class BrokerClient(aiomqtt.Client):
    """A client for one connection, which minds how the broker answers and how it is left.

    Overrides three private methods of aiomqtt 2, which has no public way to learn of a refused
    publication or of a connection that is closed before the broker answered.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pending_calls_threshold = MAX_PUBLISHING + 8
        self._refusals: dict[int, str] = {}  # by message id

    async def enter(self) -> None:
        """Connect. When cancelled, first wait for the thread that connects the socket."""
        entering = asyncio.ensure_future(self.__aenter__())
        try:
            await asyncio.shield(entering)
        except asyncio.CancelledError:
            await asyncio.wait((entering,))
            raise

    async def leave(self) -> None:
        """Disconnect, if there is something to disconnect."""
        if self._disconnected.done():
            self._disconnected.exception()  # or asyncio complains that nobody looked
            self._client.disconnect()
        elif self._client.socket() is not None:
            self.timeout = LEAVE_TIMEOUT_S
            with contextlib.suppress(aiomqtt.MqttError):
                await self.__aexit__(None, None, None)

    async def send(self, message: Outgoing) -> None:
        """Publish without a timeout: the keep-alive finds out that a broker is gone."""
        properties = properties_of(message, PacketTypes.PUBLISH)
        call = self.publish(
            *(message.topic, message.payload, message.qos, message.retain, properties),
            timeout=math.inf,
        )
        await self.answer_to(call)

    async def answer_to(self, call: Coroutine[Any, Any, Answer]) -> Answer:
        """Wait for the broker's answer, but no longer than the connection lasts.

        Raises:
            LinkDown: it broke first.
        """
        waiting = asyncio.ensure_future(call)
        try:
            await asyncio.wait((waiting, self._disconnected), return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise LinkDown("the connection to the broker broke")
            return waiting.result()
        except aiomqtt.MqttError as error:
            raise LinkDown(str(error)) from error
        finally:
            waiting.cancel()

    def _on_publish(
        self, client: Any, userdata: Any, mid: int, reason_code: Any, properties: Any
    ) -> None:
        if reason_code.is_failure:
            self._refusals[mid] = str(reason_code)
        super()._on_publish(client, userdata, mid, reason_code, properties)

    def _on_disconnect(self, client: Any, userdata: Any, *why: Any) -> None:
        if not self._connected.done():  # or `enter` would wait for its timeout
            error = aiomqtt.MqttError("the connection was closed before the broker answered")
            self._connected.set_exception(error)
        super()._on_disconnect(client, userdata, *why)

    @contextlib.contextmanager
    def _pending_call(self, mid: int, value: Any, pending_dict: Any) -> Iterator[None]:
        self._refusals.pop(mid, None)
        with super()._pending_call(mid, value, pending_dict):
            yield
        if (reason := self._refusals.pop(mid, None)) is not None:
            raise Refused(reason)


def properties_of(message: Outgoing, packet_type: int) -> Properties:
    """Return what a message says of itself, as paho takes it."""
    properties = Properties(packet_type)  # type: ignore[no-untyped-call]
    if message.content_type is not None:
        properties.ContentType = message.content_type
        properties.PayloadFormatIndicator = int(message.content_type.endswith("json"))
    if message.expiry_s is not None:
        properties.MessageExpiryInterval = message.expiry_s
    if message.notes:
        properties.UserProperty = list(message.notes)
    return properties


def incoming_of(message: aiomqtt.Message) -> Incoming:
    """Return a message of aiomqtt as our own value."""
    properties = message.properties
    return Incoming(
        topic=message.topic.value,
        payload=bytes(message.payload),
        content_type=getattr(properties, "ContentType", None),
        notes=dict(getattr(properties, "UserProperty", ())),
    )
