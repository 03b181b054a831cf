"""StreamObserver: who is told what happens to the streams of a server."""

from typing import Protocol

from d2f_stream.core.errors import D2FError
from d2f_stream.core.events import Event
from d2f_stream.server.streams.served_stream import ServedStream

__all__ = ["StreamObserver"]


class StreamObserver(Protocol):
    """Is told what happens to the streams; for metrics. Called on the event loop; must not wait."""

    def on_start(self, stream: ServedStream) -> None:
        """A request was taken on; its stream waits or runs."""
        ...

    def on_event(self, stream: ServedStream, event: Event) -> None:
        """The stream had an event."""
        ...

    def on_end(self, stream: ServedStream) -> None:
        """The stream ended, or was turned away: `stream.error`."""
        ...

    def on_resume(self, stream: ServedStream) -> None:
        """A reader came back to the stream."""
        ...

    def on_refused(self, error: D2FError) -> None:
        """A request was refused before it had a stream."""
        ...
