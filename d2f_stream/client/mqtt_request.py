"""RemoteRequest: one request of a client behind a broker, and where it stands. Reads no clock.

`RemoteStream` joins the events; this adds which worker runs the stream and what was asked of it.
"""

import asyncio
from typing import Final

from d2f_stream.client.remote import RemoteStream
from d2f_stream.core.buffer import EventBuffer
from d2f_stream.core.errors import error_from
from d2f_stream.core.events import (
    Event,
    StreamFailed,
    StreamFinished,
    StreamNames,
    StreamStarted,
)
from d2f_stream.wire.protocol import Generate

__all__ = ["RemoteRequest"]

MAX_BOUNCES: Final = 3


class RemoteRequest:
    """A request and its stream.

    Attributes:
        stream: joins the events.
        node: the worker that runs it, once it has started.
        asked_after: the `after_seq` of the latest resume; None where none is due an answer.
        deadline: when a cancelled stream is ended on this side; None if it was not cancelled.
    """

    def __init__(
        self, request: Generate, buffer: EventBuffer, names: StreamNames | None = None
    ) -> None:
        self.stream = RemoteStream(request, buffer, names)
        self.node: str | None = None
        self.asked_after: int | None = None
        self.deadline: asyncio.TimerHandle | None = None
        self._num_bounces = 0

    @property
    def request_id(self) -> str:
        """Our name for it."""
        return self.stream.request.request_id

    def receive(self, event: Event) -> bool:
        """Take an event; False where one before it is missing."""
        if not self.stream.started and not isinstance(event, StreamStarted):
            # A stream that ended while it waited has its end as its only event.
            if isinstance(event, StreamFinished) and event.seq == 0:
                self.stream.end(event)
                return True
            if isinstance(event, StreamFailed) and event.seq == 0:
                self.stream.fail(error_from(event.code, event.message))
                return True
        return self.stream.receive(event)

    def may_bounce(self) -> bool:
        """Whether a worker that shuts down may send the request on once more; counts it."""
        self._num_bounces += 1
        return self._num_bounces <= MAX_BOUNCES
