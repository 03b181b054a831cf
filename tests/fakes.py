"""Builders for tests: events, buffers and engines, ready to use in one line each."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from d2f_runtime.backends.scripted import SCRIPTED_INFO, ByteCodec, ScriptedBackend, StepGate
from d2f_runtime.engine.local import Limits, LocalEngine
from d2f_runtime.models.facts import ModelInfo
from d2f_stream.core.buffer import EventBuffer
from d2f_stream.core.events import (
    Block,
    Draft,
    Event,
    StreamFailed,
    StreamFinished,
    StreamStarted,
    Timings,
    Usage,
)
from d2f_stream.core.params import GenerationParams
from d2f_stream.core.session import Session

STREAM = "stream-1"
ANSWER = "Block diffusion writes whole blocks — naïve café 🙂 — not single tokens, one by one."


def started() -> StreamStarted:
    return StreamStarted(
        stream=STREAM, seq=0, request_id="request-1", model="fake", block_size=4, prompt_tokens=3
    )


def block(index: int, text: str = "text") -> Block:
    return Block(
        stream=STREAM,
        seq=index + 1,
        index=index,
        start=4 * index,
        stop=4 * index + 4,
        text=text,
        token_ids=(1, 2, 3, 4),
        steps=index + 1,
        elapsed_ms=1.0,
    )


def draft(index: int, text: str = "dr") -> Draft:
    return Draft(stream=STREAM, index=index, text=text)


def finished(seq: int = 1, text_length: int = 0) -> StreamFinished:
    return StreamFinished(
        stream=STREAM,
        seq=seq,
        reason="eos",
        text_length=text_length,
        usage=Usage(prompt_tokens=3, completion_tokens=4, steps=2),
        timings=Timings(first_block_ms=1.0, total_ms=2.0),
    )


def failed(seq: int = 1, code: str = "engine_failed") -> StreamFailed:
    return StreamFailed(stream=STREAM, seq=seq, code=code, message="the GPU is gone")


class Producer:
    """The engine's side of a buffer, which notes what the reader's side asks of it."""

    def __init__(self, *, high: int = 16) -> None:
        self.calls: list[str] = []
        self.buffer = EventBuffer(
            cancel=lambda: self.calls.append("cancel"),
            pause=lambda: self.calls.append("pause"),
            resume=lambda: self.calls.append("resume"),
            high=high,
        )

    def put(self, *events: Event) -> None:
        for event in events:
            self.buffer.append(event)

    def session(self) -> Session:
        return Session(self.buffer)


def info(**changes: Any) -> ModelInfo:
    return replace(SCRIPTED_INFO, **changes)


def params(**fields: Any) -> GenerationParams:
    return GenerationParams(**{"block_size": 8, "max_new_tokens": 128, **fields})


@asynccontextmanager
async def engine_over(
    backend: ScriptedBackend, *, limits: Limits | None = None
) -> AsyncIterator[LocalEngine]:
    """An open engine; at the end nothing may be left of it."""
    engine = LocalEngine.over(backend, ByteCodec(), defaults=params(), limits=limits)
    async with engine:
        try:
            yield engine
        finally:
            if backend.gate is not None:
                backend.gate.open()  # a failed assertion must not leave a step held
    check_clean(backend)


def check_clean(backend: ScriptedBackend) -> None:
    """Check that every slot was closed, the backend too, and that one thread did all of it."""
    assert backend.open_slots == {}
    assert backend.num_opened == backend.num_closed
    assert backend.closed
    assert len(backend.threads) == 1
    assert threading.current_thread().name not in backend.threads


def held(answers: str = ANSWER, **fields: Any) -> tuple[ScriptedBackend, StepGate]:
    """Return a backend whose steps wait for the gate."""
    gate = StepGate()
    return ScriptedBackend(answers, gate=gate, **fields), gate


async def texts(session: Session) -> list[str]:
    return [block.text async for block in session]


async def turn() -> None:
    """Let everything run that the event loop has ready now."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)
