"""BrokerLink: a connection to an MQTT 5 broker that comes back by itself. The only user of aiomqtt.

Knows topics as strings and payloads as bytes; nothing of streams. aiomqtt runs its client on the
event loop, without a thread but for the connect itself. Four of its habits shape this file:

- a `Client` that lost its connection keeps the future of its old one, so each attempt makes anew;
- its calls do not notice a lost connection while they wait for the broker's answer;
- a full queue of incoming messages drops what was already acknowledged: the queue here notes that
  and the link connects anew, which makes both sides resume;
- the reason in a PUBACK is not looked at, so a broker's refusal would pass for success.
"""

import asyncio
import contextlib
import logging
import math
import random
import socket
import ssl
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterator, Sequence
from typing import Any, Final, TypeVar, cast

from d2f_stream.broker import BrokerAddress, Incoming, LinkDown, LinkUser, Outgoing, Refused
from d2f_stream.errors import MissingExtra

try:
    import aiomqtt
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties
    from paho.mqtt.subscribeoptions import SubscribeOptions
except ImportError as error:
    raise MissingExtra("MQTT", error.name or "aiomqtt", "mqtt") from error

__all__ = ["BrokerLink", "Sleep", "end_tasks"]

logger = logging.getLogger("d2f_stream.mqtt")

BACKOFF_S: Final = (0.1, 0.3, 1.0, 3.0, 10.0)
KEEPALIVE_S: Final = 20
MAX_INBOX: Final = 4096
MAX_OUTBOX: Final = 4096
MAX_PUBLISHING: Final = 64
FAREWELL_TIMEOUT_S: Final = 2.0
LEAVE_TIMEOUT_S: Final = 2.0
REFUSALS: Final = {0x84, 0x85, 0x86, 0x87, 0x8A, 0x8C}  # version, name, password, rights
MAX_PACKET_BYTES: Final = 8 * 1024 * 1024

Answer = TypeVar("Answer")
Sleep = Callable[[float], Awaitable[None]]


class BrokerLink:
    """One client's connection to a broker, made again for as long as `run` runs.

    Args:
        address: of the broker.
        user: is told what happens.
        identifier: the client's name at the broker, which keeps its session by it.
        subscriptions: filters and their QoS, made on every connect.
        session_expiry_s: how long the broker keeps subscriptions and messages while we are gone.
        tls: for mqtts://; None is Python's default context.
        will: published by the broker when we are gone without a word.
        will_delay_s: how long the broker waits for us to come back before it does so.
        farewell: published by us before we leave.
        keeps_session: whether the broker goes on collecting messages for us after we have left on
            purpose. Without it we unsubscribe first; a shared subscription left behind would
            swallow messages that others wait for.
        sleep: waits between attempts.
        max_inbox: messages that wait to be handled.
    """

    def __init__(
        self,
        address: BrokerAddress,
        user: LinkUser,
        *,
        identifier: str,
        subscriptions: Sequence[tuple[str, int]],
        session_expiry_s: int,
        tls: ssl.SSLContext | None = None,
        will: Outgoing | None = None,
        will_delay_s: int = 0,
        farewell: Callable[[], Outgoing] | None = None,
        keeps_session: bool = False,
        sleep: Sleep = asyncio.sleep,
        max_inbox: int = MAX_INBOX,
    ) -> None:
        self.address = address
        self.subscriptions = list(subscriptions)
        self._user = user
        self._identifier = identifier
        self._session_expiry_s = session_expiry_s
        self._tls = tls
        self._will, self._will_delay_s, self._farewell = will, will_delay_s, farewell
        self._keeps_session = keeps_session
        self._sleep = sleep
        self._max_inbox = max_inbox
        self._num_failed = 0  # attempts since the last that went well
        self._client: _Client | None = None
        self._connected = asyncio.Event()
        self._outbox: OrderedDict[Hashable, Outgoing] = OrderedDict()
        self._posted = asyncio.Event()
        self._emptied = asyncio.Event()
        self._emptied.set()

    @property
    def connected(self) -> bool:
        """Whether there is a connection now."""
        return self._connected.is_set()

    async def wait_connected(self) -> None:
        """Wait until there is a connection. Safe to cancel."""
        await self._connected.wait()

    async def run(self) -> None:
        """Connect, and connect again whenever the connection is lost. Ends only by cancellation."""
        poster = asyncio.create_task(self._post_all(), name="d2f-mqtt-outbox")
        try:
            while True:
                try:
                    await self._connect_once()
                except (aiomqtt.MqttError, OSError, Refused, LinkDown) as error:
                    self._note_lost(error)
                pause_s = BACKOFF_S[min(self._num_failed, len(BACKOFF_S)) - 1]
                await self._sleep(pause_s * random.uniform(0.7, 1.3))
        finally:
            await end_tasks(poster)

    async def publish(self, message: Outgoing) -> None:
        """Publish, and wait for the broker to take it (QoS 1), or the socket (QoS 0).

        After cancelling, the message may be published or not.

        Raises:
            LinkDown: there is no connection, or it broke; the message may be published or not.
            Refused: the broker does not allow it.
        """
        if self._client is None:
            raise LinkDown("no connection to the broker")
        await self._client.send(message)

    def post(self, key: Hashable, message: Outgoing) -> None:
        """Publish in the background, one after the other, again after a lost connection.

        A message replaces the waiting one of the same key. Beyond a bound the oldest is dropped.
        """
        self._outbox.pop(key, None)
        self._outbox[key] = message
        if len(self._outbox) > MAX_OUTBOX:
            self._outbox.popitem(last=False)
            logger.warning("%d messages wait for the broker; the oldest is dropped", MAX_OUTBOX)
        self._emptied.clear()
        self._posted.set()

    def withdraw(self, key: Hashable) -> None:
        """Do not publish the waiting message of that key, if it still waits."""
        self._outbox.pop(key, None)
        self._posted.set()

    async def flush(self) -> None:
        """Wait until everything that was posted is published. Safe to cancel."""
        await self._emptied.wait()

    async def unsubscribe(self, filters: Sequence[str]) -> None:
        """Take no more messages of these filters, now and after every connect. Safe to cancel."""
        self.subscriptions = [pair for pair in self.subscriptions if pair[0] not in filters]
        if self._client is not None and filters:
            with contextlib.suppress(LinkDown):
                await self._client.answer_to(self._client.unsubscribe(list(filters)))

    async def _connect_once(self) -> None:
        inbox = _Inbox(self._max_inbox)
        client = self._new_client(inbox)
        try:
            await client.enter()
            await self._subscribe(client)
            self._client = client
            self._num_failed = 0
            self._connected.set()
            logger.info("connected to the broker at %s", self.address)
            self._user.on_connected()
            async for message in client.messages:
                self._hand_over(message)
                while not inbox.empty():  # aiomqtt makes a task for each that it hands out
                    self._hand_over(inbox.get_nowait())
                if inbox.overflowed:
                    raise LinkDown(f"more than {self._max_inbox} messages waited; some were lost")
        except asyncio.CancelledError:
            await self._say_farewell()
            raise
        finally:
            self._client = None
            self._connected.clear()
            await client.leave()

    def _hand_over(self, message: aiomqtt.Message) -> None:
        try:
            self._user.on_message(_incoming(message))
        except Exception:  # one message must not end the connection of all
            logger.exception("a message on %.200s failed", message.topic.value)

    async def _subscribe(self, client: "_Client") -> None:
        if not self.subscriptions:
            return
        wanted = [(name, SubscribeOptions(qos=qos)) for name, qos in self.subscriptions]
        answers: Any = await client.answer_to(client.subscribe(cast(Any, wanted)))
        for (name, _), answer in zip(self.subscriptions, answers, strict=True):
            if answer.is_failure:
                raise Refused(f"the broker does not let us read {name}: {answer}")

    def _new_client(self, inbox: "_Inbox") -> "_Client":
        address = self.address
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = self._session_expiry_s
        properties.MaximumPacketSize = MAX_PACKET_BYTES
        return _Client(
            address.host,
            address.port,
            username=address.username,
            password=address.password,
            identifier=self._identifier,
            protocol=aiomqtt.ProtocolVersion.V5,
            clean_start=False,
            properties=properties,
            keepalive=KEEPALIVE_S,
            tls_context=self._tls_context() if address.tls else None,
            will=self._paho_will(),
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
            max_concurrent_outgoing_calls=MAX_PUBLISHING,
            max_queued_incoming_messages=self._max_inbox,
            queue_type=cast(type[asyncio.Queue[aiomqtt.Message]], lambda maxsize: inbox),
        )

    def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
            self._tls.sslsocket_class = _Socket
        return self._tls

    def _paho_will(self) -> aiomqtt.Will | None:
        will = self._will
        if will is None:
            return None
        properties = _properties(will, PacketTypes.WILLMESSAGE)
        properties.WillDelayInterval = self._will_delay_s
        return aiomqtt.Will(will.topic, will.payload, will.qos, will.retain, properties)

    async def _say_farewell(self) -> None:
        if self._client is None:
            return
        with contextlib.suppress(LinkDown, Refused, TimeoutError):
            async with asyncio.timeout(FAREWELL_TIMEOUT_S):
                if not self._keeps_session:
                    await self.unsubscribe([name for name, _ in self.subscriptions])
                if self._farewell is not None:
                    await self.publish(self._farewell())

    def _note_lost(self, error: Exception) -> None:
        self._num_failed += 1
        reason = str(error) or type(error).__name__
        level = logging.WARNING if self._num_failed == 1 else logging.INFO
        text = "no connection to the broker at %s: %s; trying again"
        logger.log(level, text, self.address, reason)
        self._user.on_lost(reason, refused=isinstance(error, Refused) or _is_refusal(error))

    async def _post_all(self) -> None:
        while True:
            await self._posted.wait()
            await self._connected.wait()
            if not self._outbox:
                self._posted.clear()
                self._emptied.set()
                continue
            key, message = next(iter(self._outbox.items()))
            try:
                await self.publish(message)
            except LinkDown:
                await asyncio.sleep(0)  # until the loss was noted
                continue
            except Refused as error:
                logger.warning("the broker refused a message to %s: %s", message.topic, error)
                self._user.on_refused(message, str(error))
            if self._outbox.get(key) is message:
                del self._outbox[key]


async def end_tasks(*tasks: "asyncio.Task[Any]") -> None:
    """Cancel the tasks and wait until all have ended; a cancellation meanwhile is raised after."""
    for task in tasks:
        task.cancel()
    pending, cancelled = set(tasks), None
    while pending:
        try:
            _, pending = await asyncio.wait(pending)
        except asyncio.CancelledError as error:
            cancelled = error
            pending = {task for task in pending if not task.done()}
    if cancelled is not None:
        raise cancelled


class _Socket(ssl.SSLSocket):
    """A socket that is closed when its handshake fails, which paho leaves to the collector."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except OSError:
            self.close()
            raise


class _Inbox(asyncio.Queue[aiomqtt.Message]):
    """The queue of incoming messages, which tells that one did not fit."""

    overflowed = False

    def put_nowait(self, item: aiomqtt.Message) -> None:
        try:
            super().put_nowait(item)
        except asyncio.QueueFull:
            self.overflowed = True
            raise


class _Client(aiomqtt.Client):
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
        properties = _properties(message, PacketTypes.PUBLISH)
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


def _properties(message: Outgoing, packet_type: int) -> Properties:
    properties = Properties(packet_type)  # type: ignore[no-untyped-call]
    if message.content_type is not None:
        properties.ContentType = message.content_type
        properties.PayloadFormatIndicator = int(message.content_type.endswith("json"))
    if message.expiry_s is not None:
        properties.MessageExpiryInterval = message.expiry_s
    if message.notes:
        properties.UserProperty = list(message.notes)
    return properties


def _incoming(message: aiomqtt.Message) -> Incoming:
    properties = message.properties
    return Incoming(
        topic=message.topic.value,
        payload=bytes(message.payload),
        content_type=getattr(properties, "ContentType", None),
        retained=bool(message.retain),
        notes=dict(getattr(properties, "UserProperty", ())),
    )


def _is_refusal(error: Exception) -> bool:
    """Whether trying again may not help: the broker turns us away, or is not who it says."""
    if isinstance(error.__context__, ssl.SSLCertVerificationError):
        return True
    code = error.rc if isinstance(error, aiomqtt.MqttCodeError) else None
    return getattr(code, "value", None) in REFUSALS
