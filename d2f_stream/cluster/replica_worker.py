"""ReplicaWorker: an engine that works for servers elsewhere. Knows nothing of Ray.

Where servers share a log, it appends to it, and they read from there; else each answer goes back to
the one that asked. Whatever happens to who asked, a stream of the log is brought to its end.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Final, Protocol, Self, cast

import msgspec

import d2f_stream
from d2f_runtime.engine.local import LocalEngine
from d2f_stream.cluster.orders import (
    AnswerOrder,
    PromptOrder,
    ReplicaFacts,
    Told,
    WorkOrder,
    decode,
    encode,
    refusal,
)
from d2f_stream.core.error_codes import error_from
from d2f_stream.core.errors import D2FError, EngineFailed, InvalidRequest
from d2f_stream.core.events import Block, Event, StreamFailed
from d2f_stream.core.params import ParamOverrides
from d2f_stream.core.session import Prompt
from d2f_stream.server.streams.admission import Measured
from d2f_stream.server.streams.log import StreamLog, Work, check_model, diverged, model_of
from d2f_stream.wire.protocol import ModelCard, ModelDefaults, WirePrompt

__all__ = ["ReplicaWorker"]

BROKEN: Final = {"engine_failed", "engine_closed", "log_unavailable"}
"""Codes of errors that are no fault of the request."""
STUCK_S: Final = 120.0
"""For one step of the model; then it counts as hung."""
MAX_GATHERED: Final = 64
"""Events that cross at once at most, where they go back to who asked."""


class SharedLog(StreamLog, Protocol):
    """A log that is entered first."""

    async def __aenter__(self) -> object: ...

    async def __aexit__(self, *exc: object) -> None: ...


class ReplicaWorker:
    """Serves orders with one engine; an async context manager that opens and closes it.

    Args:
        engine: not entered yet.
        log: not entered yet either; None sends answers back.
    """

    def __init__(self, engine: LocalEngine, log: SharedLog | None = None) -> None:
        self._engine = engine
        self._log = log
        self._stack = AsyncExitStack()
        self._works: set[asyncio.Task[bytes]] = set()

    async def __aenter__(self) -> Self:
        """Load the model, warm it up, and reach the log. Safe to cancel.

        Raises:
            D2FError: the model cannot be loaded, or the log cannot be used.
        """
        async with AsyncExitStack() as stack:
            if self._log is not None:
                await stack.enter_async_context(self._log)
            await stack.enter_async_context(self._engine)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Give running streams back to the log, for others to go on with, and close the engine."""
        for work in self._works:
            work.cancel()
        if self._works:
            await asyncio.wait(self._works)
        await self._stack.aclose()

    def facts(self) -> bytes:
        """Return the `ReplicaFacts`."""
        defaults = ModelDefaults(**msgspec.structs.asdict(self._engine.defaults))
        names = set(ModelCard.__struct_fields__) - {"defaults"}
        told = {name: getattr(self._engine.info, name) for name in names}
        card = ModelCard(defaults=defaults, **told)
        return encode(
            ReplicaFacts(
                version=d2f_stream.__version__,
                card=card,
                has_log=self._log is not None,
                keeps_turns=self._engine.info.keeps_turns,
            )
        )

    def check_health(self) -> None:
        """Tell whether it is to be replaced.

        Raises:
            EngineFailed: the engine cannot work any more, or hangs in a step.
        """
        if not self._engine.usable:
            raise EngineFailed("the engine failed; another replica takes its place")
        if self._engine.busy_s > STUCK_S:
            raise EngineFailed(f"a step of the model hangs for {self._engine.busy_s:.0f} s")

    def load(self) -> dict[str, int]:
        """Return how many sessions run and wait."""
        load = self._engine.current_load
        return {"running": load.num_running, "waiting": load.num_waiting}

    async def encode(self, data: bytes) -> bytes:
        """Return a prompt's ids, or why it is refused. Safe to cancel."""
        try:
            order = decode(data, PromptOrder)
            return encode(await self._engine.encode(_asked(order.prompt), raw=order.raw))
        except D2FError as error:
            return refusal(error)

    async def work(self, data: bytes) -> bytes:
        """Bring a stream of the log to its end; return why it was refused, else nothing.

        Returns as soon as another worker has it. Safe to cancel: it goes on all the same.
        """
        order = decode(data, WorkOrder)
        work = asyncio.create_task(self._work(order), name=f"d2f-work-{order.stream}")
        self._works.add(work)
        work.add_done_callback(self._works.discard)
        return await asyncio.shield(work)

    async def answer(self, data: bytes) -> AsyncIterator[bytes]:
        """Yield an answer's events, as many at once as came meanwhile, or why it is refused.

        Closing it cancels the answer.
        """
        order = decode(data, AnswerOrder)
        model = model_of(self._engine)
        try:
            if order.committed:
                check_model(order.model, model)
            session = self._engine.generate(
                _asked(order.request.prompt),
                names=order.names,
                committed=order.committed,
                raw=order.request.raw,
                **order.request.params.to_dict(),
            )
            async with session:
                gathered: list[Event] = []
                async for event in session.events():
                    if isinstance(event, StreamFailed) and event.code in BROKEN:
                        raise error_from(event.code, event.message)
                    gathered.append(event)
                    if session.num_waiting == 0 or len(gathered) >= MAX_GATHERED:
                        yield encode(Told(model, gathered))
                        gathered = []
        except D2FError as error:
            yield refusal(error)

    async def _work(self, order: WorkOrder) -> bytes:
        if self._log is None:
            return refusal(InvalidRequest("the engines were deployed without a log"))
        try:
            prompt = await self._engine.encode(_asked(order.prompt), raw=order.raw)
            overrides = Measured(
                prompt, order.raw, order.params.to_dict(), clamp=order.clamp, charge=0
            ).fitted(
                len(prompt),
                max_prompt_tokens=order.max_prompt_tokens,
                max_len=self._engine.info.max_len,
            )
            work = await self._log.work(
                order.stream, model=model_of(self._engine), by_force=order.by_force
            )
            if work is not None:
                async with work:
                    await self._continue(work, prompt, overrides)
        except D2FError as error:
            return refusal(error)
        return b""

    async def _continue(self, work: Work, prompt: list[int], overrides: ParamOverrides) -> None:
        blocks = [event for event in work.events if isinstance(event, Block)]
        try:
            session = self._engine.generate(prompt, names=work.names, committed=blocks, **overrides)
            try:
                work.on_cancel(session.cancel)
                async for event in session.events():
                    if isinstance(event, StreamFailed) and event.code in BROKEN:
                        raise error_from(event.code, event.message)
                    if not await work.append(event):
                        if work.is_lost:
                            return
                        raise diverged(event)
            finally:
                session.cancel()  # waits for nothing: a step may hang
        except D2FError as error:
            if not work.events or error.code in BROKEN:
                raise  # the request is turned away, or another replica goes on with it
            await work.append(
                StreamFailed(
                    stream=work.stream_id,
                    seq=len(work.events),
                    code=error.code,
                    message=str(error),
                )
            )


def _asked(prompt: WirePrompt) -> Prompt:
    """Return a prompt for an engine, which refuses what mixes ids and messages."""
    return cast("Prompt", prompt)
