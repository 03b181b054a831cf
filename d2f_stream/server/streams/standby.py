"""StandBy: streams that others work for, and who take them over where those vanish."""

import asyncio
import logging
from collections.abc import Callable

from d2f_stream.core.errors import D2FError
from d2f_stream.core.session import Engine
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.streams.admission import Measured, measured
from d2f_stream.server.streams.log import StreamLog, check_model, model_of
from d2f_stream.server.streams.served_stream import ServedStream

__all__ = ["StandBy"]

logger = logging.getLogger("d2f_stream.server")


class StandBy:
    """Watches over streams of a shared log that have readers here. Belongs to one event loop.

    Args:
        engine: could work for them.
        log: keeps them.
        limits: what is taken on.
        take_over: is given a stream that has lost its worker.
    """

    def __init__(
        self,
        engine: Engine,
        log: StreamLog,
        limits: ServeLimits,
        *,
        take_over: Callable[[ServedStream, Measured], None],
    ) -> None:
        self._engine = engine
        self._log = log
        self._limits = limits
        self._take_over = take_over
        self._guards: dict[asyncio.Task[bool], ServedStream] = {}

    def watch(self, stream: ServedStream) -> None:
        """See to a stream until its end. Idempotent; without effect on one that is seen to."""
        if stream.is_attended or stream.has_terminal or stream.ended:
            return
        stream.is_attended = True
        guard = asyncio.create_task(self._guard(stream), name=f"d2f-guard-{stream.id}")
        self._guards[guard] = stream
        guard.add_done_callback(self._note_end)

    async def close(self) -> None:
        """Watch no more; the streams go on. Safe to cancel."""
        for guard in self._guards:
            guard.cancel()
        if self._guards:
            await asyncio.wait(list(self._guards))

    async def _guard(self, stream: ServedStream) -> bool:
        """Wait for a stream's end; False where it has none, but lost its worker.

        Raises:
            OtherModel: it cannot go on here.
        """
        await self._log.wait_free(stream)
        if stream.has_terminal or stream.ended:
            return True
        if (model := model_of(self._engine)) is not None:  # before its prompt is read
            check_model(await self._log.begun_by(stream.id), model)
        return stream.has_terminal or stream.ended

    def _note_end(self, guard: "asyncio.Task[bool]") -> None:
        stream = self._guards.pop(guard)
        if guard.cancelled():
            return
        error = guard.exception()
        if error is None and not guard.result():
            error = self._hand_over(stream)
            if error is None:
                return
        if error is not None and not isinstance(error, D2FError):
            logger.error("stream %s lost its events", stream.id, exc_info=error)
            error = D2FError("an error inside the server; its log has more")
        if not stream.ended:
            stream.end(error)
        self._log.retain(stream)

    def _hand_over(self, stream: ServedStream) -> D2FError | None:
        """Have a stream worked on here; return why it cannot be."""
        logger.warning("stream %s has lost its worker and is taken over", stream.id)
        assert stream.request is not None
        try:
            asked = measured(stream.request, self._engine, self._limits, clamp=stream.clamp)
        except D2FError as error:
            return error
        self._take_over(stream, asked)
        return None
