"""StreamPublisher: brings the log of one stream to a broker, exactly as far as it acknowledges.

A message that was on its way when the connection broke is published again; readers drop what they
have by its seq. The retained state follows the events: where the broker is slower than the stream,
one state stands for several blocks.
"""

import asyncio
from typing import TypedDict

from d2f_stream.channels.broker import LinkDown, Outgoing
from d2f_stream.channels.mqtt import BrokerLink
from d2f_stream.core.errors import D2FError
from d2f_stream.core.events import Block, Draft, Event, StreamFailed, StreamFinished
from d2f_stream.server.streams.served_stream import Cursor, ServedStream
from d2f_stream.wire.codec import Codec
from d2f_stream.wire.protocol import RequestRejected
from d2f_stream.wire.topics import StreamKind, StreamState, StreamTopic, encode

__all__ = ["StreamPublisher"]


class StreamPublisher:
    """Publishes a stream's events, its state and, where asked for, its drafts.

    Attributes:
        done: whether everything was published and acknowledged, or it was given up.

    Args:
        stream: what is published.
        link: to the broker.
        client: whose topics.
        node: this worker.
        codec: of the request.
        after_seq: the reader has the events up to this one.
        drafts: whether drafts are published.
        expiry_s: how long the broker keeps events and state, whole seconds.
    """

    def __init__(
        self,
        stream: ServedStream,
        link: BrokerLink,
        client: str,
        node: str,
        codec: Codec,
        *,
        after_seq: int,
        drafts: bool,
        expiry_s: int,
    ) -> None:
        self.stream = stream
        self._link = link
        self._client, self._node, self._codec = client, node, codec
        self._drafts = drafts
        self._expiry_s = expiry_s
        self.done = False
        self._wake = asyncio.Event()
        self._acknowledged = after_seq  # where to read on when the connection breaks
        self._highest = after_seq  # of all that was acknowledged: what the state stands for
        self._stated: int | None = None  # last_seq of the state that the broker has
        self._cursor = stream.read(after_seq=after_seq, drafts=drafts, wake=self._wake.set)

    def rewind(self, after_seq: int) -> None:
        """Publish again from the event after `after_seq` on: the reader has those before.

        Raises:
            InvalidRequest: the stream has no such event.
        """
        cursor = self.stream.read(after_seq=after_seq, drafts=self._drafts, wake=self._wake.set)
        self._cursor.detach()
        self._cursor, self._acknowledged = cursor, after_seq

    def note_reconnect(self) -> None:
        """Publish the state again: the broker may have been restarted without it."""
        self._stated = None
        self._wake.set()

    async def run(self) -> None:
        """Publish to the stream's end. Cancelling it loses nothing of the stream.

        Raises:
            Refused: the broker does not let this worker publish.
        """
        try:
            while not self.done:
                self._wake.clear()
                try:
                    self.done = await self._publish_ready()
                except LinkDown:
                    await asyncio.sleep(0)  # until the link has noted it
                    await self._link.wait_connected()
                    self.rewind(self._acknowledged)
                    continue
                if not self.done:
                    await self._wake.wait()
        finally:
            self.done = True
            self._cursor.detach()

    def cleared_state(self) -> Outgoing:
        """Return the message that makes the broker forget the state."""
        return Outgoing(self._topic("state"), b"", retain=True)

    async def _publish_ready(self) -> bool:
        """Publish what there is; True once nothing more will come."""
        while True:
            cursor, error = self._cursor, self.stream.error
            if (event := cursor.next_event()) is not None:
                await self._publish_event(cursor, event)
            elif cursor.exhausted and error is not None:
                await self._publish_rejection(error)
                return True
            elif self._stated != self._highest:
                await self._publish_state()
            else:
                return cursor.exhausted

    async def _publish_event(self, cursor: Cursor, event: Event) -> None:
        data = self._codec.encode(event)
        if isinstance(event, Draft):
            await self._link.publish(Outgoing(self._topic("drafts"), data, qos=0, **self._common))
            return
        await self._link.publish(Outgoing(self._topic("events"), data, **self._common))
        if cursor is self._cursor:  # or a resume came meanwhile
            self._acknowledged = event.seq
        self._highest = max(self._highest, event.seq)

    async def _publish_state(self) -> None:
        upto = self._highest
        log = self.stream.log[: upto + 1]
        last = log[-1] if log else None
        state = StreamState(
            stream=self.stream.id,
            request_id=self.stream.request_id,
            node=self._node,
            last_seq=upto,
            text="".join(event.text for event in log if isinstance(event, Block)),
            terminal=last if isinstance(last, StreamFinished | StreamFailed) else None,
        )
        self._stated = upto
        data = encode(state, self._codec)
        try:
            await self._link.publish(
                Outgoing(self._topic("state"), data, retain=True, **self._common)
            )
        except LinkDown:
            self._stated = None
            raise

    async def _publish_rejection(self, error: D2FError) -> None:
        started = self.stream.started
        message = RequestRejected.of(
            error,
            request_id=None if started else self.stream.request_id,
            stream=self.stream.id if started else None,
        )
        data = self._codec.encode(message)
        await self._link.publish(Outgoing(self._topic("events"), data, **self._common))
        await self._link.publish(self.cleared_state())

    @property
    def _common(self) -> "_Common":
        return {
            "content_type": self._codec.content_type,
            "expiry_s": self._expiry_s,
            "notes": (("node", self._node),),
        }

    def _topic(self, kind: StreamKind) -> str:
        return str(StreamTopic(self._client, self.stream.request_id, kind))


class _Common(TypedDict):
    content_type: str
    expiry_s: int
    notes: tuple[tuple[str, str], ...]
