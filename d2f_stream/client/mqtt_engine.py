"""MqttEngine: an engine whose answers come from workers behind an MQTT broker.

Owns when the engine is connected, and how long a broker or a worker may be away. The connection is
a `BrokerLink`, the requests and what is said about them a `Conversation`, the workers are `Nodes`.
"""

import asyncio
import contextlib
import logging
import secrets
import ssl
from functools import partial
from types import TracebackType
from typing import Final, Literal, Self, Unpack

from d2f_stream.channels.broker import BrokerAddress, Incoming, Outgoing
from d2f_stream.channels.mqtt import BrokerLink, Sleep
from d2f_stream.client.conversation import Conversation
from d2f_stream.client.mqtt_nodes import Nodes
from d2f_stream.client.mqtt_posts import keys_of, message_of
from d2f_stream.client.remote import new_request
from d2f_stream.core.buffer import EventBuffer
from d2f_stream.core.errors import (
    ConnectionLost,
    D2FError,
    EngineClosed,
    MessageTooLarge,
    RemoteError,
    Unauthorized,
    WorkerLost,
)
from d2f_stream.core.events import StreamNames, StreamStarted
from d2f_stream.core.params import GenerationParams, ParamOverrides
from d2f_stream.core.session import Prompt, Session
from d2f_stream.wire.codec import JSON, MSGPACK
from d2f_stream.wire.protocol import (
    Generate,
    ModelCard,
    ServerClosing,
    ServerHello,
)
from d2f_stream.wire.topics import (
    STATUSES,
    NodeStatus,
    NodeStatusTopic,
    StreamTopic,
    codec_of,
    decode,
    parse,
    streams_of,
)

__all__ = ["MqttEngine", "connect_mqtt"]

logger = logging.getLogger("d2f_stream.mqtt")

CANCEL_GRACE_S: Final = 5.0
"""So long a cancelled stream waits for its worker's last events."""

LOSS_GRACE_S: Final = 1.0
"""So long the last events of a worker may come after the news that it is gone."""

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
        self._reconnect_timeout_s = reconnect_timeout_s
        self._linger_s = linger_s
        self._new_link = partial(
            BrokerLink,
            self._address,
            self,
            identifier=identifier,
            subscriptions=[(events, 1), (drafts, 0), (STATUSES, 1)],
            session_expiry_s=session_expiry_s,
            keeps_session=client_id is not None,
            tls=tls,
            sleep=sleep,
        )
        self._nodes = Nodes(on_online=self._note_online, on_offline=self._note_offline)
        self._codec = MSGPACK if encoding == "msgpack" else JSON
        self._conversation = Conversation(
            self._note_change, ended=self._note_ended, has_others=True
        )
        self._card: ModelCard | None = None
        self._absence: asyncio.TimerHandle | None = None  # broker or workers are away
        self._trouble = "no answer"
        self._refusal: D2FError | None = None
        self._link: BrokerLink | None = None
        self._running: asyncio.Task[None] | None = None
        self._links: set[asyncio.Task[None]] = set()  # that one, and those that still disconnect
        self._ending: asyncio.Task[None] | None = None
        self._resting: asyncio.TimerHandle | None = None
        self._entered = False
        self._closing = False
        self._known = asyncio.Event()  # what the workers serve, or that we are refused

    @property
    def info(self) -> ModelCard:
        """What the workers serve, once the first of them has told."""
        if self._card is None:
            raise RuntimeError("no worker is known yet; enter the engine with `async with`")
        return self._card

    @property
    def defaults(self) -> GenerationParams:
        """The parameters of a request that gives none, once a worker has told."""
        return self.info.params

    @property
    def usable(self) -> bool:
        """Whether requests are accepted: not closed, and not turned away by the broker."""
        return not self._closing and self._refusal is None

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
        defaults = None if self._card is None else self._card.params
        request = new_request(prompt, params, overrides, defaults=defaults)
        size = len(self._codec.encode(request))
        if size > MAX_REQUEST_BYTES:  # a broker would disconnect us, and again at each repetition
            raise MessageTooLarge(
                f"the request has {size} bytes but the limit over MQTT is {MAX_REQUEST_BYTES}; "
                "shorten the prompt"
            )
        cancel = partial(self._cancel, request.request_id)
        buffer = EventBuffer(cancel=cancel)
        self._start()
        self._conversation.ask(request, buffer, names)
        self._watch()
        return Session(buffer)

    def shut(self) -> None:
        """Begin to close, without waiting. Idempotent."""
        if self._closing:
            return
        self._closing = True
        self._conversation.abandon(EngineClosed("the engine was closed"))
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
                await self._known.wait()
            self._check_open()
        except TimeoutError:
            problem = self._absence_error(self._connect_timeout_s)
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
            self._link = self._new_link()
            self._running = asyncio.create_task(self._link.run(), name="d2f-mqtt-link")
            self._links.add(self._running)
            self._running.add_done_callback(self._note_link_end)

    async def _end(self) -> None:
        assert self._link is not None
        if self._link.connected:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_TIMEOUT_S):
                    await self._link.flush()
        self._rest()
        if self._links:
            await asyncio.wait(set(self._links))

    def _rest(self) -> None:
        """Disconnect until the next request; for good if the engine is closing."""
        for timer in (self._absence, self._resting):
            if timer is not None:
                timer.cancel()
        self._absence = self._resting = None
        self._nodes.pause()
        if self._running is not None:
            self._running.cancel()
            self._running = None
        self._conversation.broken()

    def _check_open(self) -> None:
        if self._closing:
            raise EngineClosed("the engine was closed; connect() again")
        if self._refusal is not None:
            raise self._refusal

    # What the link tells.

    def on_connected(self) -> None:
        """Say again what may be lost, once a worker is known."""
        self._nodes.listen()
        self._watch()

    def on_lost(self, reason: str, *, refused: bool) -> None:
        """Wait for the link to come back, up to a bound."""
        self._trouble = reason
        self._nodes.pause()
        self._conversation.broken()
        if refused and self._card is None:
            where = f"the broker at {self._address}"
            if "certificate" in reason:
                self._refusal = ConnectionLost(f"{where} is not trusted: {reason}")
            else:
                self._refusal = Unauthorized(
                    f"{where} does not let us in: {reason}; {self._address.credentials}"
                )
            self._known.set()
            self._conversation.fail(self._refusal)
            self._rest()
        self._watch()

    def on_refused(self, message: Outgoing, reason: str) -> None:
        """End the request that the broker does not take."""
        operation = codec_of(message.content_type).decode_operation(message.payload)
        if isinstance(operation, Generate):
            text = f"the broker does not let {self.client!r} publish to {message.topic}: {reason}"
            kind = Unauthorized if "authori" in reason.lower() else RemoteError
            self._conversation.fail_request(operation.request_id, kind(text))

    def on_message(self, message: Incoming) -> None:
        """Take an event of a stream, or the status of a worker."""
        topic = parse(message.topic)
        try:
            match topic:
                case NodeStatusTopic(node):
                    self._note_status(node, message)
                case StreamTopic(client, request_id, _) if client == self.client:
                    self._receive(request_id, message)
                case _:
                    pass
        except D2FError as error:
            logger.warning("a message on %.200s is dropped: %s", message.topic, error)

    def _note_link_end(self, running: "asyncio.Task[None]") -> None:
        self._links.discard(running)
        if running is not self._running:
            return
        self._running = None
        broken = None if running.cancelled() else running.exception()
        if broken is not None:
            logger.error("the connection to the broker failed", exc_info=broken)
            problem = ConnectionLost(f"the connection to the broker failed: {broken!r}")
            self._conversation.fail(problem)
        else:
            self._conversation.fail(EngineClosed("the engine's event loop was shut down"))

    # What the conversation tells.

    def _note_change(self) -> None:
        """Publish what there is to say; rest if nobody waits for anything."""
        while self._link is not None and (post := self._conversation.next_post()) is not None:
            if (message := message_of(post, self.client, self._codec)) is not None:
                self._link.post(*message)
        is_idle = not (self._entered or self._closing or self._conversation.num_requests)
        if is_idle and self._running is not None and self._resting is None:
            loop = asyncio.get_running_loop()
            self._resting = loop.call_later(self._linger_s, self._rest)

    def _note_ended(self, request_id: str) -> None:
        if self._link is not None:
            for key in keys_of(request_id):
                self._link.withdraw(key)

    def _cancel(self, request_id: str) -> None:
        """Give a request up; what runs has a while for its worker's last events."""
        self._conversation.cancel(request_id)
        if self._conversation.has_started(request_id):
            loop = asyncio.get_running_loop()
            loop.call_later(CANCEL_GRACE_S, self._conversation.end_cancelled, request_id)
        else:
            self._conversation.end_cancelled(request_id)

    # Workers.

    def _note_status(self, node: str, message: Incoming) -> None:
        if not message.payload:
            return  # cleared: its ttl decides
        status = decode(message.payload, NodeStatus, codec_of(message.content_type))
        if status.node == node:
            self._nodes.note(status)
        self._watch()

    def _note_online(self, node: str, requests_lost: bool) -> None:
        if self._card is None:
            self._card = self._nodes.card
        if self._card is not None:
            self._known.set()
        if self._conversation.up:
            self._conversation.recover(node, unstarted=requests_lost)

    def _note_offline(self, node: str) -> None:
        """Give up the streams of a worker, and ask others for what it may not have started."""
        loop = asyncio.get_running_loop()
        loop.call_later(LOSS_GRACE_S, self._lose_streams, node)  # their ends may be on the way
        if self._nodes.card is not None:
            self._conversation.recover("", unstarted=True)

    def _lose_streams(self, node: str) -> None:
        if self._nodes.is_gone(node):
            problem = WorkerLost(f"the worker {node} that ran the stream is gone")
            self._conversation.lost(node, problem)

    def _receive(self, request_id: str, message: Incoming) -> None:
        """Take what a worker says about a request."""
        node = message.notes.get("node", "")
        said = codec_of(message.content_type).decode_message(message.payload)
        if said is None or isinstance(said, ServerHello | ServerClosing):
            return
        self._conversation.receive(said, server=node, request_id=request_id)
        if node and self._conversation.has_started(request_id):
            self._nodes.expect(node)
            if isinstance(said, StreamStarted) and self._nodes.is_gone(node):
                self._note_offline(node)

    def _watch(self) -> None:
        """Note whether anybody listens; bound how long requests wait for a broker or a worker."""
        assert self._link is not None
        is_up = self._link.connected and self._nodes.card is not None
        if is_up != self._conversation.up:
            if is_up:
                self._conversation.opened()
            else:
                self._conversation.broken()
        if is_up:
            if self._absence is not None:
                self._absence.cancel()
                self._absence = None
        elif self._absence is None and self._conversation.num_requests:
            loop = asyncio.get_running_loop()
            self._absence = loop.call_later(self._reconnect_timeout_s, self._give_up)

    def _give_up(self) -> None:
        assert self._link is not None
        self._absence = None
        problem = self._absence_error(self._reconnect_timeout_s)
        self._conversation.fail(problem, started=not self._link.connected)

    def _absence_error(self, waited_s: float) -> ConnectionLost:
        where = f"the broker at {self._address}"
        if self._link is not None and self._link.connected:
            return ConnectionLost(
                f"{where} has had no worker online for {waited_s:g} s; "
                "start one: d2f-stream serve --mqtt URL"
            )
        return ConnectionLost(f"{where} was not reached for {waited_s:g} s: {self._trouble}")


connect_mqtt = MqttEngine
"""The engine of an mqtt:// or mqtts:// URL; `MqttEngine` says what it takes."""
