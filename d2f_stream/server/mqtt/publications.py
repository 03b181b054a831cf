"""Publications: the streams that a worker brings to a broker, each by a publisher of its own.

Publishing never holds the engine up: a publisher reads its stream's log at the broker's pace, and
remembers what was acknowledged.
"""

import asyncio
import logging
import math

from d2f_stream.channels.mqtt import BrokerLink
from d2f_stream.server.mqtt.publisher import StreamPublisher
from d2f_stream.server.streams.served_stream import ServedStream
from d2f_stream.wire.codec import Codec

__all__ = ["Publications"]

logger = logging.getLogger("d2f_stream.mqtt")


class Publications:
    """The streams that are published. Belongs to one event loop.

    Args:
        link: to the broker.
        node: this worker.
        ttl_s: how long a stream can be resumed after its end, seconds.
    """

    def __init__(self, link: BrokerLink, *, node: str, ttl_s: float) -> None:
        self._link = link
        self._node = node
        self._ttl_s = ttl_s
        self._publishers: dict[str, StreamPublisher] = {}  # by stream id
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = False

    def publish(
        self, stream: ServedStream, client: str, codec: Codec, *, after_seq: int, drafts: bool
    ) -> None:
        """Publish a stream from the event after `after_seq` on, once more where that is done.

        Raises:
            InvalidRequest: the stream has no such event.
        """
        known = self._publishers.get(stream.id)
        if known is not None and not known.done:
            known.rewind(after_seq)
            return
        publisher = StreamPublisher(
            stream,
            self._link,
            *(client, self._node, codec),
            after_seq=after_seq,
            drafts=drafts,
            expiry_s=max(1, math.ceil(self._ttl_s)),
        )
        self._publishers[stream.id] = publisher
        task = asyncio.create_task(publisher.run(), name=f"d2f-mqtt-{stream.id}")
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._note_published(task, publisher))

    def note_reconnect(self) -> None:
        """Publish anew what the broker may have lost."""
        for publisher in self._publishers.values():
            publisher.note_reconnect()

    def cancel(self) -> None:
        """Cancel the streams that are published."""
        for publisher in self._publishers.values():
            publisher.stream.cancel()

    async def wait_published(self) -> None:
        """Wait until every stream has ended and the broker has all of it. Safe to cancel."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    def give_up(self) -> tuple["asyncio.Task[None]", ...]:
        """Begin nothing any more; return the tasks that publish, for their owner to end."""
        self._ended = True
        return tuple(self._tasks)

    def _note_published(self, task: "asyncio.Task[None]", publisher: StreamPublisher) -> None:
        self._tasks.discard(task)
        if self._publishers.get(publisher.stream.id) is publisher:
            del self._publishers[publisher.stream.id]
        if task.cancelled():
            return
        if (broken := task.exception()) is not None:
            logger.error("stream %s is not published", publisher.stream.id, exc_info=broken)
            return
        asyncio.get_running_loop().call_later(self._ttl_s, self._clear_state, publisher)

    def _clear_state(self, publisher: StreamPublisher) -> None:
        if not self._ended:
            self._link.post(("state", publisher.stream.id), publisher.cleared_state())
