"""WorkerTalk: a conversation with the workers behind a broker, over connections that come and go.

Knows when anybody listens, and how long a broker or a worker may be away. When it is connected at
all is its line's.
"""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Final

from d2f_stream.channels.broker import BrokerAddress, Incoming, Outgoing
from d2f_stream.channels.mqtt import BrokerLink
from d2f_stream.channels.patience import Patience
from d2f_stream.client.conversation import Conversation
from d2f_stream.client.mqtt_nodes import Nodes
from d2f_stream.client.mqtt_posts import keys_of, message_of
from d2f_stream.core.errors import (
    ConnectionLost,
    D2FError,
    RemoteError,
    Unauthorized,
    WorkerLost,
)
from d2f_stream.core.events import StreamStarted
from d2f_stream.wire.codec import Codec
from d2f_stream.wire.protocol import Generate, ModelCard, ServerClosing, ServerHello
from d2f_stream.wire.topics import (
    NodeStatus,
    NodeStatusTopic,
    StreamTopic,
    codec_of,
    decode,
    parse,
)

__all__ = ["WorkerTalk"]

logger = logging.getLogger("d2f_stream.mqtt")

LOSS_GRACE_S: Final = 1.0
"""So long the last events of a worker may come after the news that it is gone."""


class WorkerTalk:
    """Says what a conversation has to say, and hears the workers. Belongs to one event loop.

    Args:
        address: of the broker, for errors.
        client: our name in the topics.
        codec: of requests and events.
        patience_s: without broker or worker, until the requests fail.
        changed: called when there may be nothing to wait for any more.
        turned_away: called when the broker does not let us in.

    Attributes:
        conversation: what was asked.
        link: the connection, once there is one.
        card: what the workers serve, once the first of them has told.
        refusal: why the broker turned us away, if it did.
        known: set once either is there.
    """

    def __init__(
        self,
        address: BrokerAddress,
        *,
        client: str,
        codec: Codec,
        patience_s: float,
        changed: Callable[[], None],
        turned_away: Callable[[], None],
    ) -> None:
        self.conversation = Conversation(self._note_change, ended=self._note_ended, has_others=True)
        self.link: BrokerLink | None = None
        self.card: ModelCard | None = None
        self.refusal: D2FError | None = None
        self.known = asyncio.Event()
        self._address = address
        self._client = client
        self._codec = codec
        self._patience_s = patience_s
        self._changed = changed
        self._turned_away = turned_away
        self._nodes = Nodes(on_online=self._note_online, on_offline=self._note_offline)
        self._orphaned: set[str] = set()  # gone workers whose streams wait for another
        self._absence: Patience | None = None  # broker or workers are away
        self._trouble = "no answer"

    def watch(self) -> None:
        """Note whether anybody listens; bound how long requests wait for a broker or a worker."""
        assert self.link is not None
        is_up = self.link.connected and self._nodes.card is not None
        if is_up != self.conversation.up:
            if is_up:
                self.conversation.opened()
            else:
                self.conversation.broken()
        if is_up:
            if self._absence is not None:
                self._absence.cancel()
                self._absence = None
        elif self._absence is None and self.conversation.num_requests:
            self._absence = Patience(self._patience_s, self._give_up)

    def rest(self) -> None:
        """Hear nothing until the next connection; nothing is waited for meanwhile."""
        if self._absence is not None:
            self._absence.cancel()
            self._absence = None
        self._nodes.pause()
        self.conversation.broken()

    def absence_error(self, waited_s: float) -> ConnectionLost:
        """Return what to tell who has waited for nothing."""
        where = f"the broker at {self._address}"
        if self.link is not None and self.link.connected:
            return ConnectionLost(
                f"{where} has had no worker online for {waited_s:g} s; "
                "start one: d2f-stream serve --mqtt URL"
            )
        return ConnectionLost(f"{where} was not reached for {waited_s:g} s: {self._trouble}")

    # What the link tells.

    def on_connected(self) -> None:
        """Say again what may be lost, once a worker is known."""
        self._nodes.listen()
        self.watch()

    def on_lost(self, reason: str, *, refused: bool) -> None:
        """Wait for the link to come back, up to a bound."""
        self._trouble = reason
        self._nodes.pause()
        self.conversation.broken()
        if refused and self.card is None:
            where = f"the broker at {self._address}"
            if "certificate" in reason:
                self.refusal = ConnectionLost(f"{where} is not trusted: {reason}")
            else:
                self.refusal = Unauthorized(
                    f"{where} does not let us in: {reason}; {self._address.credentials}"
                )
            self.known.set()
            self.conversation.fail(self.refusal)
            self._turned_away()
        self.watch()

    def on_refused(self, message: Outgoing, reason: str) -> None:
        """End the request that the broker does not take."""
        operation = codec_of(message.content_type).decode_operation(message.payload)
        if isinstance(operation, Generate):
            text = f"the broker does not let {self._client!r} publish to {message.topic}: {reason}"
            kind = Unauthorized if "authori" in reason.lower() else RemoteError
            self.conversation.fail_request(operation.request_id, kind(text))

    async def on_message(self, message: Incoming) -> None:
        """Take an event of a stream, or the status of a worker."""
        topic = parse(message.topic)
        try:
            match topic:
                case NodeStatusTopic(node):
                    self._note_status(node, message)
                case StreamTopic(client, request_id, _) if client == self._client:
                    self._receive(request_id, message)
                case _:
                    pass
        except D2FError as error:
            logger.warning("a message on %.200s is dropped: %s", message.topic, error)

    # What the conversation tells.

    def _note_change(self) -> None:
        """Publish what there is to say."""
        while self.link is not None and (post := self.conversation.next_post()) is not None:
            if (message := message_of(post, self._client, self._codec)) is not None:
                self.link.post(*message)
        self._changed()

    def _note_ended(self, request_id: str) -> None:
        if self.link is not None:
            for key in keys_of(request_id):
                self.link.withdraw(key)

    # Workers.

    def _note_status(self, node: str, message: Incoming) -> None:
        if not message.payload:
            return  # cleared: its ttl decides
        status = decode(message.payload, NodeStatus, codec_of(message.content_type))
        if status.node == node:
            self._nodes.note(status)
        self.watch()

    def _note_online(self, node: str, requests_lost: bool) -> None:
        self._orphaned.discard(node)
        if self.card is None:
            self.card = self._nodes.card
        if self.card is not None:
            self.known.set()
        if self.conversation.up:
            self.conversation.recover(node, unstarted=requests_lost)
        for orphaned in list(self._orphaned):
            self._lose_streams(orphaned)

    def _note_offline(self, node: str) -> None:
        """Lose the streams of a worker, and ask others for what it may not have started."""
        Patience(LOSS_GRACE_S, self._lose_streams, node)  # their ends may be on the way
        if self._nodes.card is not None:
            self.conversation.recover("", unstarted=True)

    def _lose_streams(self, node: str, *, waits: bool = True) -> None:
        """Have the streams of a gone worker read on by another; without one, they end."""
        if not self._nodes.is_gone(node):
            return
        heir = self._nodes.heir_of(node)
        if not heir and waits and self._nodes.shares_log(node):
            if node not in self._orphaned:
                self._orphaned.add(node)
                give_up = partial(self._lose_streams, node, waits=False)
                Patience(self._patience_s, give_up)
            return
        self._orphaned.discard(node)
        problem = WorkerLost(f"the worker {node} that ran the stream is gone")
        self.conversation.lost(node, problem, heir=heir)

    def _receive(self, request_id: str, message: Incoming) -> None:
        """Take what a worker says about a request."""
        node = message.notes.get("node", "")
        said = codec_of(message.content_type).decode_message(message.payload)
        if said is None or isinstance(said, ServerHello | ServerClosing):
            return
        self.conversation.receive(said, server=node, request_id=request_id)
        if node and self.conversation.has_started(request_id):
            self._nodes.expect(node)
            if isinstance(said, StreamStarted) and self._nodes.is_gone(node):
                self._note_offline(node)

    def _give_up(self) -> None:
        assert self.link is not None
        self._absence = None
        problem = self.absence_error(self._patience_s)
        self.conversation.fail(problem, started=not self.link.connected)
