"""MqttLine: a client's line to the workers behind an MQTT broker.

Owns when there is a connection, which is a `BrokerLink`; what is said over it, and who hears it, is
a `WorkerTalk`'s.
"""

import asyncio
import contextlib
import logging
import secrets
import ssl
from collections.abc import Callable
from functools import partial
from typing import Final, Literal

from d2f_stream.channels.broker import BrokerAddress
from d2f_stream.channels.mqtt import BrokerLink, Sleep
from d2f_stream.channels.patience import Patience, patient_timeout
from d2f_stream.client.remote_engine import RemoteEngine
from d2f_stream.client.worker_talk import WorkerTalk
from d2f_stream.core.buffer import EventBuffer
from d2f_stream.core.errors import ConnectionLost, D2FError, EngineClosed, MessageTooLarge
from d2f_stream.core.events import StreamNames
from d2f_stream.wire.codec import JSON, MSGPACK, Codec
from d2f_stream.wire.protocol import Generate, ModelCard
from d2f_stream.wire.topics import STATUSES, streams_of

__all__ = ["MqttLine", "connect_mqtt"]

logger = logging.getLogger("d2f_stream.mqtt")

CANCEL_GRACE_S: Final = 5.0
"""So long a cancelled stream waits for its worker's last events."""

MAX_REQUEST_BYTES: Final = 512 * 1024
FLUSH_TIMEOUT_S: Final = 2.0
LINGER_S: Final = 5.0

SESSION_EXPIRY_S: Final = 300
"""So long the broker keeps messages while we are gone."""


class MqttLine:
    """Keeps a client connected while that is needed, or for good once it was entered.

    Args:
        address: of the broker, for errors.
        new_link: makes a connection to it.
        client: our name in the topics.
        codec: of requests and events.
        connect_timeout_s: for the first connection and the first worker.
        reconnect_timeout_s: without broker or worker, until the requests fail.
        linger_s: how long an idle connection is kept where the line was not entered, seconds.
    """

    def __init__(
        self,
        address: BrokerAddress,
        new_link: Callable[[WorkerTalk], BrokerLink],
        *,
        client: str,
        codec: Codec,
        connect_timeout_s: float,
        reconnect_timeout_s: float,
        linger_s: float,
    ) -> None:
        self._new_link = new_link
        self._codec = codec
        self._connect_timeout_s = connect_timeout_s
        self._linger_s = linger_s
        self._talk = WorkerTalk(
            address,
            client=client,
            codec=codec,
            patience_s=reconnect_timeout_s,
            changed=self._note_change,
            turned_away=self._rest,
        )
        self._running: asyncio.Task[None] | None = None
        self._links: set[asyncio.Task[None]] = set()  # that one, and those that still disconnect
        self._ending: asyncio.Task[None] | None = None
        self._resting: asyncio.TimerHandle | None = None
        self._entered = False
        self._closing = False

    @property
    def card(self) -> ModelCard | None:
        """What the workers serve, once the first of them has told."""
        return self._talk.card

    @property
    def refusal(self) -> D2FError | None:
        """Why the broker turned us away, if it did."""
        return self._talk.refusal

    def ask(self, request: Generate, buffer: EventBuffer, names: StreamNames | None) -> None:
        """Take a request on, and connect where that is not done.

        Raises:
            MessageTooLarge: the request is larger than brokers usually allow.
        """
        size = len(self._codec.encode(request))
        if size > MAX_REQUEST_BYTES:  # a broker would disconnect us, and again at each repetition
            raise MessageTooLarge(
                f"the request has {size} bytes but the limit over MQTT is {MAX_REQUEST_BYTES}; "
                "shorten the prompt"
            )
        self._start()
        self._talk.conversation.ask(request, buffer, names)
        self._talk.watch()

    def cancel(self, request_id: str) -> None:
        """Give a request up; what runs has a while for its worker's last events."""
        conversation = self._talk.conversation
        conversation.cancel(request_id)
        if conversation.has_started(request_id):
            Patience(CANCEL_GRACE_S, conversation.end_cancelled, request_id)
        else:
            conversation.end_cancelled(request_id)

    async def enter(self) -> None:
        """Connect, wait until a worker is online or we are refused, and stay connected.

        Raises:
            ConnectionLost: there is no broker, or there is no worker.
        """
        self._entered = True
        self._start()
        try:
            async with patient_timeout(self._connect_timeout_s):
                await self._talk.known.wait()
        except TimeoutError:
            raise self._talk.absence_error(self._connect_timeout_s) from None

    def shut(self) -> None:
        """End all requests, and disconnect once the workers know."""
        self._closing = True
        self._talk.conversation.abandon(EngineClosed("the engine was closed"))
        if self._links:
            self._ending = asyncio.create_task(self._end(), name="d2f-mqtt-closing")

    async def wait_closed(self) -> None:
        """Wait until the connection is closed. Safe to cancel."""
        if self._ending is not None:
            await asyncio.wait((self._ending,))

    def _start(self) -> None:
        if self._resting is not None:
            self._resting.cancel()
            self._resting = None
        if self._running is None:
            self._talk.link = link = self._new_link(self._talk)
            self._running = asyncio.create_task(link.run(), name="d2f-mqtt-link")
            self._links.add(self._running)
            self._running.add_done_callback(self._note_link_end)

    async def _end(self) -> None:
        link = self._talk.link
        if link is not None and link.connected:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_TIMEOUT_S):
                    await link.flush()
        self._rest()
        if self._links:
            await asyncio.wait(set(self._links))

    def _rest(self) -> None:
        """Disconnect until the next request; for good if the engine is closing."""
        if self._resting is not None:
            self._resting.cancel()
            self._resting = None
        if self._running is not None:
            self._running.cancel()
            self._running = None
        self._talk.rest()

    def _note_change(self) -> None:
        """Rest after a while if nobody waits for anything."""
        is_idle = not (self._entered or self._closing or self._talk.conversation.num_requests)
        if is_idle and self._running is not None and self._resting is None:
            loop = asyncio.get_running_loop()
            self._resting = loop.call_later(self._linger_s, self._rest)

    def _note_link_end(self, running: "asyncio.Task[None]") -> None:
        self._links.discard(running)
        if running is not self._running:
            return
        self._running = None
        conversation = self._talk.conversation
        broken = None if running.cancelled() else running.exception()
        if broken is not None:
            logger.error("the connection to the broker failed", exc_info=broken)
            problem = ConnectionLost(f"the connection to the broker failed: {broken!r}")
            conversation.fail(problem)
        else:
            conversation.fail(EngineClosed("the engine's event loop was shut down"))


def connect_mqtt(
    url: str,
    *,
    client: str | None = None,
    token: str | None = None,
    encoding: Literal["json", "msgpack"] = "json",
    connect_timeout_s: float = 30.0,
    reconnect_timeout_s: float = 300.0,
    linger_s: float = LINGER_S,
    tls: ssl.SSLContext | None = None,
    sleep: Sleep = asyncio.sleep,
) -> RemoteEngine:
    """Return an engine whose answers come from workers behind an MQTT broker.

        async with connect_mqtt("mqtt://alice:secret@broker:1883") as engine:
            async for block in engine.generate(messages):
                print(block.text, end="")

    Args:
        url: mqtt://user:password@host:1883 or mqtts://...; the password is shown nowhere.
        client: the name in the topics, which the broker's access rules compare with the user.
            None is the URL's user, and without one a new name.
        token: the user's password, so that it need not stand in the URL.
        encoding: of requests and events.
        connect_timeout_s: for the first connection and the first worker.
        reconnect_timeout_s: without broker or worker, until the requests fail.
        linger_s: how long an idle connection is kept outside `async with`, seconds.
        tls: for mqtts://; None is Python's default context.
        sleep: waits between attempts to connect.

    Raises:
        InvalidRequest: URL or name cannot be used, or there is a token without a user.
    """
    address = BrokerAddress.parse(url, password=token)
    client = client or address.username or f"d2f-{secrets.token_hex(8)}"
    events, drafts = (streams_of(client, kind) for kind in ("events", "drafts"))
    new_link = partial(
        BrokerLink,
        address,
        identifier=f"d2f-{secrets.token_hex(16)}",  # who knows it can take the connection's place
        subscriptions=[(events, 1), (drafts, 0), (STATUSES, 1)],
        session_expiry_s=SESSION_EXPIRY_S,
        tls=tls,
        sleep=sleep,
    )
    line = MqttLine(
        address,
        new_link,
        client=client,
        codec=MSGPACK if encoding == "msgpack" else JSON,
        connect_timeout_s=connect_timeout_s,
        reconnect_timeout_s=reconnect_timeout_s,
        linger_s=linger_s,
    )
    return RemoteEngine(line)
