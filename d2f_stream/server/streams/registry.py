"""StreamRegistry: starts the streams of a server and finds them again. Knows no transport.

A stream outlives the connections that read it. Its session is always drained into its log, so a
reader that does not read holds nothing up, and the log is kept for a while after the stream's end,
so that whoever lost a connection can read on.
"""

import asyncio
import contextlib
import logging
from typing import Final

import msgspec

from d2f_stream.channels.patience import patient_timeout
from d2f_stream.core.errors import D2FError, RequestConflict, ServerShuttingDown
from d2f_stream.core.session import Engine
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.streams.admission import Admission, measured
from d2f_stream.server.streams.log import StreamLog
from d2f_stream.server.streams.memory_log import MemoryLog
from d2f_stream.server.streams.observer import StreamObserver
from d2f_stream.server.streams.runs import Runs
from d2f_stream.server.streams.served_stream import ServedStream, digest_of
from d2f_stream.server.streams.standby import StandBy
from d2f_stream.wire.protocol import Generate, ModelCard, ModelDefaults, check_request_id

__all__ = ["StreamRegistry"]

logger = logging.getLogger("d2f_stream.server")


GRACE_S: Final = 5.0
RESTORE_S: Final = 5.0
"""For a worker to give the log what that has lost; one that is gone is replaced as fast."""


class StreamRegistry:
    """Starts streams on an engine and finds them again.

    Belongs to one event loop. `shut_down` must be awaited before the engine is closed.

    Args:
        engine: open; what answers.
        limits: what is taken on.
        observer: is told of everything.
        log: keeps the streams, and is its owner's; None keeps them in this process.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        limits: ServeLimits | None = None,
        observer: StreamObserver | None = None,
        log: StreamLog | None = None,
    ) -> None:
        self.engine = engine
        self.limits = limits or ServeLimits()
        self._observer = observer
        self._log: StreamLog = MemoryLog(self.limits) if log is None else log
        self._admission = Admission(self.limits)
        self._runs = Runs(engine, self._log, self._admission, self.limits, observer)
        self._stand_by = StandBy(engine, self._log, self.limits, take_over=self._runs.take_over)
        self._admits = True

    @property
    def card(self) -> ModelCard:
        """What is told of the engine's model."""
        defaults = ModelDefaults(**msgspec.structs.asdict(self.engine.defaults))
        names = set(ModelCard.__struct_fields__) - {"defaults"}
        told = {name: getattr(self.engine.info, name) for name in names}
        return ModelCard(defaults=defaults, **told)

    @property
    def num_active(self) -> int:
        """Streams that run or wait."""
        return len(self._runs)

    @property
    def num_waiting(self) -> int:
        """Of those, the ones that wait for their turn."""
        return self._runs.num_waiting

    @property
    def num_abandoned(self) -> int:
        """Streams that the engine did not end in time when the registry shut down."""
        return self._runs.num_abandoned

    @property
    def paused(self) -> bool:
        """Whether requests wait until the engine is back."""
        return self._runs.paused

    @property
    def num_retained(self) -> int:
        """Streams that can be read, those that ended included."""
        return len(self._log)

    @property
    def shared_log(self) -> str:
        """The name of the log that other servers read and go on with; "" where none do."""
        return self._log.name

    @property
    def admits(self) -> bool:
        """Whether new requests are taken on."""
        return self._admits

    async def generate(
        self, request: Generate, *, client: str, asker: str | None = None, clamp: bool = False
    ) -> ServedStream:
        """Start a stream, or return the one that this request started before.

        What is wrong with the prompt shows later, as the stream's `error`. Safe to cancel; whether
        the stream was started then shows when the request is sent again.

        Args:
            request: what is asked.
            client: whose stream it is.
            asker: who takes turns with others; None is the client.
            clamp: whether an answer is shortened, not refused, where the model has no room for its
                length. One whose length the request leaves open always is.

        Raises:
            RequestConflict: the request id stands for another request.
            D2FError: the request is refused; nothing was started.
        """
        try:
            check_request_id(request.request_id)
            stream = await self._log.of_request(request.request_id, client=client)
            if stream is None:
                stream, is_new = await self._start(request, client, asker or client, clamp)
                if is_new:
                    return stream
            self._stand_by.watch(stream)
            if stream.digest != digest_of(request):
                raise RequestConflict(
                    f"request_id {request.request_id!r} stands for another request of yours; "
                    "take a new one for each request"
                )
            if self._observer is not None:
                self._observer.on_resume(stream)
            return stream
        except D2FError as error:
            if self._observer is not None:
                self._observer.on_refused(error)
            raise

    async def resume(self, stream_id: str, *, client: str, after_seq: int = -1) -> ServedStream:
        """Return a stream of the client's. Safe to cancel.

        Args:
            stream_id: which.
            client: whose it must be.
            after_seq: the last event that the reader has. A shared log that has lost it may get it
                back from the stream's worker, which is waited for.

        Raises:
            StreamLost: there is none of that id.
        """
        stream = await self._log.find(stream_id, client=client)
        self._stand_by.watch(stream)
        if self._log.outlives:
            with contextlib.suppress(TimeoutError):
                async with patient_timeout(RESTORE_S):
                    # A reader would count as one, and its leaving might cancel the stream.
                    while after_seq >= len(stream.log) and not stream.has_terminal:  # noqa: ASYNC110
                        await asyncio.sleep(RESTORE_S / 50)
        if self._observer is not None:
            self._observer.on_resume(stream)
        return stream

    async def cancel(self, name: str, *, client: str) -> None:
        """End the client's stream of that id or request id. Idempotent; safe to cancel.

        Raises:
            StreamLost: there is none.
        """
        stream = await self._log.of_request(name, client=client)
        if stream is None:
            stream = await self._log.find(name, client=client)
        self._stand_by.watch(stream)
        stream.cancel()

    def pause(self) -> None:
        """Let requests wait, those that come and those that wait already. Idempotent."""
        self._runs.pause()

    def go_on(self) -> None:
        """Serve the requests that wait. Idempotent."""
        self._runs.go_on()

    async def shut_down(self, deadline_s: float, *, grace_s: float = GRACE_S) -> None:
        """Refuse new requests, let the streams end, and cancel what is left at the deadline.

        Safe to cancel; the streams still running are then cancelled by closing the engine.

        Args:
            deadline_s: how long streams may run on, seconds.
            grace_s: how long the engine may take to cancel them; those that it does not, since a
                step hangs, are let go.
        """
        self._admits = False
        await self._stand_by.close()
        await self._runs.end(deadline_s, grace_s=grace_s)

    async def _start(
        self, request: Generate, client: str, asker: str, clamp: bool
    ) -> tuple[ServedStream, bool]:
        """Start a stream, unless another server has just done so: then return that one's."""
        self._check_admits()
        asked = measured(request, self.engine, self.limits, clamp=clamp)
        self._admission.admit(client, asked.charge, now_s=asyncio.get_running_loop().time())
        is_new = False
        try:
            stream, is_new = await self._log.create(
                request, client=client, asker=asker, clamp=clamp
            )
            if is_new:
                self._check_admits()  # it may have begun to shut down meanwhile
        except ServerShuttingDown:
            self._log.forget(stream)
            raise
        finally:
            if not (is_new and self._admits):
                self._admission.release(client, asked.charge)
        if is_new:
            self._runs.begin(stream, asked)
        return stream, is_new

    def _check_admits(self) -> None:
        if not self._admits:
            raise ServerShuttingDown("the server is shutting down; try again later")
