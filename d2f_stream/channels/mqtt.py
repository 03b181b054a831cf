"""BrokerLink: a connection to an MQTT 5 broker that comes back by itself.

Knows topics as strings and payloads as bytes; nothing of streams. One attempt to connect is one
`BrokerClient` (mqtt_connection.py), where aiomqtt's habits are dealt with.
"""

import asyncio
import contextlib
import logging
import random
import socket
import ssl
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any, Final, cast

from d2f_stream.channels.broker import BrokerAddress, LinkDown, LinkUser, Outgoing, Refused
from d2f_stream.channels.ending import end_tasks
from d2f_stream.channels.unreachable import reason_of
from d2f_stream.core.errors import MissingExtra

try:
    import aiomqtt
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties
    from paho.mqtt.subscribeoptions import SubscribeOptions
except ImportError as error:
    raise MissingExtra("MQTT", error.name or "aiomqtt", "mqtt") from error

from d2f_stream.channels.mqtt_connection import (
    MAX_PUBLISHING,
    BrokerClient,
    Inbox,
    incoming_of,
    new_tls_context,
    properties_of,
)

__all__ = ["BrokerLink", "Sleep"]

logger = logging.getLogger("d2f_stream.mqtt")

BACKOFF_S: Final = (0.1, 0.3, 1.0, 3.0, 10.0)
KEEPALIVE_S: Final = 20
MAX_INBOX: Final = 4096
MAX_OUTBOX: Final = 4096
FAREWELL_TIMEOUT_S: Final = 2.0
REFUSALS: Final = {0x84, 0x85, 0x86, 0x87, 0x8A, 0x8C}  # version, name, password, rights
MAX_PACKET_BYTES: Final = 8 * 1024 * 1024

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
        self._sleep = sleep
        self._max_inbox = max_inbox
        self._num_failed = 0  # attempts since the last that went well
        self._client: BrokerClient | None = None
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
        inbox = Inbox(self._max_inbox)
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
                await self._hand_over(message)
                while not inbox.empty():  # aiomqtt makes a task for each that it hands out
                    await self._hand_over(inbox.get_nowait())
                if inbox.overflowed:
                    raise LinkDown(f"more than {self._max_inbox} messages waited; some were lost")
        except asyncio.CancelledError:
            await self._say_farewell()
            raise
        finally:
            self._client = None
            self._connected.clear()
            await client.leave()

    async def _hand_over(self, message: aiomqtt.Message) -> None:
        try:
            await self._user.on_message(incoming_of(message))
        except Exception:  # one message must not end the connection of all
            logger.exception("a message on %.200s failed", message.topic.value)

    async def _subscribe(self, client: BrokerClient) -> None:
        if not self.subscriptions:
            return
        wanted = [(name, SubscribeOptions(qos=qos)) for name, qos in self.subscriptions]
        answers: Any = await client.answer_to(client.subscribe(cast(Any, wanted)))
        for (name, _), answer in zip(self.subscriptions, answers, strict=True):
            if answer.is_failure:
                raise Refused(f"the broker does not let us read {name}: {answer}")

    def _new_client(self, inbox: Inbox) -> BrokerClient:
        address = self.address
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = self._session_expiry_s
        properties.MaximumPacketSize = MAX_PACKET_BYTES
        return BrokerClient(
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
            self._tls = new_tls_context()
        return self._tls

    def _paho_will(self) -> aiomqtt.Will | None:
        will = self._will
        if will is None:
            return None
        properties = properties_of(will, PacketTypes.WILLMESSAGE)
        properties.WillDelayInterval = self._will_delay_s
        return aiomqtt.Will(will.topic, will.payload, will.qos, will.retain, properties)

    async def _say_farewell(self) -> None:
        if self._client is None:
            return
        with contextlib.suppress(LinkDown, Refused, TimeoutError):
            async with asyncio.timeout(FAREWELL_TIMEOUT_S):
                # Left behind, a shared subscription would swallow messages that others wait for.
                await self.unsubscribe([name for name, _ in self.subscriptions])
                if self._farewell is not None:
                    await self.publish(self._farewell())

    def _note_lost(self, error: Exception) -> None:
        self._num_failed += 1
        reason = reason_of(error)
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


def _is_refusal(error: Exception) -> bool:
    """Whether trying again may not help: the broker turns us away, or is not who it says."""
    if isinstance(error.__context__, ssl.SSLCertVerificationError):
        return True
    code = error.rc if isinstance(error, aiomqtt.MqttCodeError) else None
    return getattr(code, "value", None) in REFUSALS
