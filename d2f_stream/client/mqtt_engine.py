"""MqttEngine: an engine whose answers come from workers behind an MQTT broker.

Owns when the engine is connected. The connection is a `BrokerLink`; what is said over it, and who
hears it, is an `MqttLine`'s.
"""

import asyncio
import contextlib
import logging
import secrets
import ssl
from functools import partial
from types import TracebackType
from typing import Final, Literal, Self, Unpack

from d2f_stream.channels.broker import BrokerAddress
from d2f_stream.channels.mqtt import BrokerLink, Sleep
from d2f_stream.client.mqtt_line import MqttLine
from d2f_stream.client.remote import new_request
from d2f_stream.core.buffer import EventBuffer
from d2f_stream.core.errors import ConnectionLost, EngineClosed, MessageTooLarge
from d2f_stream.core.events import StreamNames
from d2f_stream.core.params import GenerationParams, ParamOverrides
from d2f_stream.core.session import Prompt, Session
from d2f_stream.wire.codec import JSON, MSGPACK
from d2f_stream.wire.protocol import ModelCard
from d2f_stream.wire.topics import STATUSES, streams_of

__all__ = ["MqttEngine", "connect_mqtt"]

logger = logging.getLogger("d2f_stream.mqtt")

CANCEL_GRACE_S: Final = 5.0
"""So long a cancelled stream waits for its worker's last events."""

MAX_REQUEST_BYTES: Final = 512 * 1024
FLUSH_TIMEOUT_S: Final = 2.0
LINGER_S: Final = 5.0


class MqttEngine:
    """Requests through a broker; used like a local engine. Belongs to one event loop.

        async with connect_mqtt("mqtt://alice:secret@broker:1883") as engine:
            async for block in engine.generate(question):
                print(block.text, end="")

    Entering it connects and waits for the first worker; leaving it ends all sessions. Requests may
    come earlier, or without it: they connect by themselves, and the connection is closed when it
    has not been needed for a while.

    Attributes:
        client: our name in the topics.

    Args:
        url: mqtt://user:password@host:1883 or mqtts://...; the password is shown nowhere.
        client: the name in the topics, which the broker's access rules compare with the user.
            None is the URL's user, without one the client id, and without that a new name.
        client_id: the name of this connection at the broker, one at a time. With it the broker
            keeps its messages for `session_expiry_s` when the program is gone too. Whoever knows it
            can take its place where the broker does not bind it to the user, so it must be hard to
            guess; None is a new one, kept over lost connections only.
        token: the user's password, so that it need not stand in the URL.
        encoding: of requests and events.
        connect_timeout_s: for the first connection and the first worker.
        reconnect_timeout_s: without broker or worker, until the requests fail.
        session_expiry_s: how long the broker keeps messages while we are gone, whole seconds.
        linger_s: how long an idle connection is kept outside `async with`, seconds.
        tls: for mqtts://; None is Python's default context.
        sleep: waits between attempts to connect.

    Raises:
        InvalidRequest: URL or name cannot be used, or there is a token without a user.
    """

    def __init__(
        self,
        url: str,
        *,
        client: str | None = None,
        client_id: str | None = None,
        token: str | None = None,
        encoding: Literal["json", "msgpack"] = "json",
        connect_timeout_s: float = 30.0,
        reconnect_timeout_s: float = 300.0,
        session_expiry_s: int = 300,
        linger_s: float = LINGER_S,
        tls: ssl.SSLContext | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._address = BrokerAddress.parse(url, password=token)
        # Names stand in topics; whoever knows an identifier can take the connection's place.
        identifier = client_id or f"d2f-{secrets.token_hex(16)}"
        named = client or self._address.username or client_id
        self.client = named or f"d2f-{secrets.token_hex(8)}"
        events, drafts = (streams_of(self.client, kind) for kind in ("events", "drafts"))
        self._connect_timeout_s = connect_timeout_s
        self._linger_s = linger_s
        self._codec = MSGPACK if encoding == "msgpack" else JSON
        self._line = MqttLine(
            self._address,
            client=self.client,
            codec=self._codec,
            patience_s=reconnect_timeout_s,
            changed=self._note_change,
            turned_away=self._rest,
        )
        self._new_link = partial(
            BrokerLink,
            self._address,
            self._line,
            identifier=identifier,
            subscriptions=[(events, 1), (drafts, 0), (STATUSES, 1)],
            session_expiry_s=session_expiry_s,
            keeps_session=client_id is not None,
            tls=tls,
            sleep=sleep,
        )
        self._running: asyncio.Task[None] | None = None
        self._links: set[asyncio.Task[None]] = set()  # that one, and those that still disconnect
        self._ending: asyncio.Task[None] | None = None
        self._resting: asyncio.TimerHandle | None = None
        self._entered = False
        self._closing = False

    @property
    def info(self) -> ModelCard:
        """What the workers serve, once the first of them has told."""
        if self._line.card is None:
            raise RuntimeError("no worker is known yet; enter the engine with `async with`")
        return self._line.card

    @property
    def defaults(self) -> GenerationParams:
        """The parameters of a request that gives none, once a worker has told."""
        return self.info.params

    @property
    def usable(self) -> bool:
        """Whether requests are accepted: not closed, and not turned away by the broker."""
        return not self._closing and self._line.refusal is None

    def generate(
        self,
        prompt: Prompt,
        params: GenerationParams | None = None,
        *,
        names: StreamNames | None = None,
        **overrides: Unpack[ParamOverrides],
    ) -> Session:
        """Start a request; the session streams its answer.

        Raises:
            InvalidRequest: prompt or parameters cannot be sent, or are known not to fit.
            EngineClosed: the engine was closed.
            MessageTooLarge: the request is larger than brokers usually allow.
            Unauthorized: the broker did not let us in.
        """
        self._check_open()
        card = self._line.card
        request = new_request(
            prompt, params, overrides, defaults=None if card is None else card.params
        )
        size = len(self._codec.encode(request))
        if size > MAX_REQUEST_BYTES:  # a broker would disconnect us, and again at each repetition
            raise MessageTooLarge(
                f"the request has {size} bytes but the limit over MQTT is {MAX_REQUEST_BYTES}; "
                "shorten the prompt"
            )
        cancel = partial(self._cancel, request.request_id)
        buffer = EventBuffer(cancel=cancel)
        self._start()
        self._line.conversation.ask(request, buffer, names)
        self._line.watch()
        return Session(buffer)

    def shut(self) -> None:
        """Begin to close, without waiting. Idempotent."""
        if self._closing:
            return
        self._closing = True
        self._line.conversation.abandon(EngineClosed("the engine was closed"))
        if self._links:
            self._ending = asyncio.create_task(self._end(), name="d2f-mqtt-closing")

    async def close(self) -> None:
        """End all sessions, tell the workers, and disconnect. Idempotent.

        Safe to cancel; the engine goes on closing.
        """
        self.shut()
        if self._ending is not None:
            await asyncio.wait((self._ending,))

    async def __aenter__(self) -> Self:
        """Connect, and wait until a worker is online.

        Raises:
            ConnectionLost: there is no broker, or it is not trusted, or there is no worker.
            Unauthorized: the broker does not let us in.
            EngineClosed: the engine was closed.
        """
        self._check_open()
        self._entered = True
        self._start()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await self._line.known.wait()
            self._check_open()
        except TimeoutError:
            problem = self._line.absence_error(self._connect_timeout_s)
            await self.close()
            raise problem from None
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the engine. Safe to cancel; the engine goes on closing."""
        await self.close()

    def _start(self) -> None:
        if self._resting is not None:
            self._resting.cancel()
            self._resting = None
        if self._running is None:
            self._line.link = link = self._new_link()
            self._running = asyncio.create_task(link.run(), name="d2f-mqtt-link")
            self._links.add(self._running)
            self._running.add_done_callback(self._note_link_end)

    async def _end(self) -> None:
        link = self._line.link
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
        self._line.rest()

    def _note_change(self) -> None:
        """Rest after a while if nobody waits for anything."""
        is_idle = not (self._entered or self._closing or self._line.conversation.num_requests)
        if is_idle and self._running is not None and self._resting is None:
            loop = asyncio.get_running_loop()
            self._resting = loop.call_later(self._linger_s, self._rest)

    def _check_open(self) -> None:
        if self._closing:
            raise EngineClosed("the engine was closed; connect() again")
        if self._line.refusal is not None:
            raise self._line.refusal

    def _note_link_end(self, running: "asyncio.Task[None]") -> None:
        self._links.discard(running)
        if running is not self._running:
            return
        self._running = None
        conversation = self._line.conversation
        broken = None if running.cancelled() else running.exception()
        if broken is not None:
            logger.error("the connection to the broker failed", exc_info=broken)
            problem = ConnectionLost(f"the connection to the broker failed: {broken!r}")
            conversation.fail(problem)
        else:
            conversation.fail(EngineClosed("the engine's event loop was shut down"))

    def _cancel(self, request_id: str) -> None:
        """Give a request up; what runs has a while for its worker's last events."""
        conversation = self._line.conversation
        conversation.cancel(request_id)
        if conversation.has_started(request_id):
            loop = asyncio.get_running_loop()
            loop.call_later(CANCEL_GRACE_S, conversation.end_cancelled, request_id)
        else:
            conversation.end_cancelled(request_id)


connect_mqtt = MqttEngine
"""The engine of an mqtt:// or mqtts:// URL; `MqttEngine` says what it takes."""
