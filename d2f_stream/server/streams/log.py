"""StreamLog: where the streams of a server are kept, so that they outlive who works and who reads.

The seam between one process and many. `MemoryLog` keeps streams in this process and is the default;
`ValkeyLog` keeps them in a store that several servers share: any of them reads any stream from any
event on, and each stream has one worker at a time, wherever that runs.

Whoever reads gets a `ServedStream`, which is this process's copy of a stream and grows as the log
does. Whoever works for a stream holds its lease, a `Work`, and appends to the log through that
only. The log takes each `seq` once and without a gap, so a worker that was thought dead and its
replacement cannot repeat, reorder or mix up anything.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, Self, runtime_checkable

from d2f_stream.core.errors import WorkerLost
from d2f_stream.core.events import Draft, Event, StreamNames
from d2f_stream.core.identity import ModelIdentity
from d2f_stream.core.session import Engine
from d2f_stream.server.streams.admission import Measured
from d2f_stream.server.streams.served_stream import ServedStream
from d2f_stream.wire.protocol import Generate

__all__ = [
    "LoggingEngine",
    "OtherModel",
    "StreamLog",
    "Work",
    "check_model",
    "diverged",
    "model_of",
]


class Work(Protocol):
    """A worker's hold on one stream: its lease, renewed while the context is open.

    It ends with the context, by an event that ends the stream, or when the worker was silent for
    longer than the lease runs: then another worker may take the stream over, and once one has,
    `append` refuses.
    """

    @property
    def stream_id(self) -> str:
        """The stream."""
        ...

    @property
    def names(self) -> StreamNames:
        """What the stream's events call it and its request, and whose it is."""
        ...

    @property
    def events(self) -> Sequence[Event]:
        """The stream's durable events, those of earlier workers included; not to be changed."""
        ...

    @property
    def is_lost(self) -> bool:
        """Whether the lease is another's, or was given back."""
        ...

    async def append(self, event: Event) -> bool:
        """Append the stream's next event.

        False where the stream is no longer this worker's, or (`is_lost` tells which) where the log
        has another event of that `seq`: then this worker cannot go on with the answer.

        A draft is passed on to whoever reads now, and kept nowhere. Safe to cancel: the event is in
        the log, or is not.

        Raises:
            LogUnavailable: the log could not be reached for too long, or has no room.
        """
        ...

    def on_cancel(self, cancel: Callable[[], None]) -> None:
        """Have `cancel` called when the stream is cancelled, at once where it was before."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc: object) -> None:
        """Give the lease back: a stream that has not ended may be worked on by others at once."""
        ...


class StreamLog(Protocol):
    """Keeps streams. Belongs to one event loop."""

    @property
    def name(self) -> str:
        """What all that share it call it; "" where nobody else does."""
        ...

    @property
    def outlives(self) -> bool:
        """Whether streams go on elsewhere when this process ends."""
        ...

    def __len__(self) -> int:
        """Streams that this process has a copy of."""
        ...

    async def create(
        self, request: Generate, *, client: str, asker: str, clamp: bool
    ) -> tuple[ServedStream, bool]:
        """Return the stream of the client's request, and whether it was made just now.

        Of any number of servers that are asked at once, one makes it.

        Args:
            request: what is asked.
            client: whose stream it is: nobody else finds it.
            asker: who takes turns with others for it.
            clamp: whether the answer is shortened where the model has no room for its length.

        Raises:
            LogUnavailable: the log cannot be reached, or has no room.
        """
        ...

    async def of_request(self, request_id: str, *, client: str) -> ServedStream | None:
        """Return the stream that the client's request started; None where there is none."""
        ...

    async def find(self, stream_id: str, *, client: str) -> ServedStream:
        """Return the client's stream, with all that the log has of it now.

        Raises:
            StreamLost: there is none of that id.
            LogUnavailable: the log cannot be reached.
        """
        ...

    async def work(
        self, stream_id: str, *, model: ModelIdentity | None = None, by_force: bool = False
    ) -> Work | None:
        """Take the stream's lease; None where another worker has it, or the stream has ended.

        Args:
            stream_id: the stream.
            model: what will answer: it goes on with its own answers only. None for who appends
                nothing that comes from a model.
            by_force: take it from a worker that is known to be dead. Were it alive, it could append
                nothing more.

        Raises:
            StreamLost: there is no such stream.
            OtherModel: another model has begun with the answer.
            LogUnavailable: the log cannot be reached.
        """
        ...

    async def begun_by(self, stream_id: str) -> ModelIdentity | None:
        """Return the model that has begun with the answer; None where none has, or none is known.

        Raises:
            LogUnavailable: the log cannot be reached.
        """
        ...

    async def follow(self, stream: ServedStream) -> None:
        """Have this process's copy grow by what others append, until its end. Idempotent.

        `of_request` and `find` have done so. Safe to cancel.

        Raises:
            LogUnavailable: the log cannot be reached.
        """
        ...

    async def wait_free(self, stream: ServedStream, *, is_given: bool = False) -> None:
        """Wait until the stream has ended here, or nobody holds its lease any more. Safe to cancel.

        Args:
            stream: which.
            is_given: whether a worker was called, who may take a while to begin.

        Raises:
            StreamLost: the log has forgotten it.
            LogUnavailable: the log could not be reached for too long.
        """
        ...

    def retain(self, stream: ServedStream) -> None:
        """Keep a stream that has ended until its time is over, or others need the room."""
        ...

    def forget(self, stream: ServedStream) -> None:
        """Let a stream be found no more: its request may come again. Idempotent."""
        ...


@runtime_checkable
class LoggingEngine(Protocol):
    """An engine whose workers append to the log themselves, elsewhere.

    A server asks it to have a stream worked on, and reads the events from the log like everybody.
    """

    async def work(
        self,
        names: StreamNames,
        asked: Measured,
        *,
        max_prompt_tokens: int | None,
        is_deserted: Callable[[], Awaitable[bool]],
    ) -> None:
        """Have a worker bring the stream to its end, from where the log has it. Safe to cancel.

        The worker reads the prompt and takes the stream's lease by `StreamLog.work`. Returns once
        the stream has ended or another worker has it; where a worker is lost, takes another one.

        Args:
            names: of the stream.
            asked: the request.
            max_prompt_tokens: that the server takes.
            is_deserted: waits until the stream has ended (False), or until a worker that had its
                lease has it no more (True).

        Raises:
            D2FError: no worker takes it, and nothing was appended for the last one.
        """
        ...


class OtherModel(WorkerLost):
    """The answer was begun by another model; whoever has that may still go on with it."""


def model_of(engine: Engine) -> ModelIdentity | None:
    """Return what tells an engine's model from others; None where others answer for it."""
    identity = getattr(engine.info, "identity", None)
    return identity if isinstance(identity, ModelIdentity) else None


def check_model(began: ModelIdentity | None, here: ModelIdentity | None) -> None:
    """Refuse to have a model go on with what another one began.

    Raises:
        OtherModel: names both.
    """
    if began is not None and here is not None and began.digest != here.digest:
        raise OtherModel(
            f"the worker of the answer is gone: it was begun by {began} and cannot go on here, "
            f"where {here} answers; ask again, or serve the first again"
        )


def diverged(event: Event) -> WorkerLost:
    """Return why a worker whose event is not the one that the log has gives the answer up."""
    place = "its draft" if isinstance(event, Draft) else f"its event {event.seq}"
    return WorkerLost(
        f"the worker of the answer is gone, and no other can go on with it: {place} comes out "
        "differently; ask again"
    )
