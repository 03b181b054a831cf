"""A scripted model behind a real server, for the benchmarks of serving."""

import asyncio
import gc
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from d2f_runtime.backends.base import StepRow
from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend
from d2f_runtime.decoding.window import Proposals
from d2f_runtime.engine.local import Limits, LocalEngine
from d2f_stream.core.params import GenerationParams
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.metrics import Metrics
from d2f_stream.server.serve import Server
from d2f_stream.server.settings import ServeSettings

__all__ = [
    "LENGTH",
    "PARAMS",
    "answer_to",
    "engine_of",
    "rss_mb",
    "serving_model",
    "until_forgotten",
    "url_of",
]

PARAMS: Final = GenerationParams(max_new_tokens=512, block_size=8)
LENGTH: Final = 320  # of answers, bytes


def answer_to(prompt: str, length: int) -> str:
    """Return what the scripted model answers: its own text for each prompt, not all ASCII."""
    line = f"Block diffusion writes whole blocks — naïve café 🙂 — for {prompt}. "
    data = (line * (length // len(line.encode()) + 1)).encode()[:length]
    return data.decode(errors="ignore")


@dataclass(slots=True)
class _Backend(ScriptedBackend):
    """Answers each prompt in its own words, a step in `step_s` seconds."""

    step_s: float = 0.0

    def step(self, rows: Sequence[StepRow]) -> list[Proposals]:
        if self.step_s:
            time.sleep(self.step_s)
        return ScriptedBackend.step(self, rows)


@asynccontextmanager
async def serving_model(
    *,
    step_s: float = 0.0,
    length: int = LENGTH,
    metrics: Metrics | None = None,
    **settings: Any,
) -> AsyncIterator[Server]:
    """Serve the scripted model on a free port, to as many streams at once as its engine takes."""
    room = Limits(max_sessions=1024, max_rows=64)
    limits = replace(
        settings.pop("limits", ServeLimits()),
        max_running=room.max_sessions,
        max_running_per_client=room.max_sessions,
    )
    chosen = ServeSettings(port=0, ui=False, limits=limits, **settings)
    async with (
        engine_of(step_s=step_s, length=length, limits=room) as engine,
        Server(engine, chosen, metrics=metrics) as server,
    ):
        yield server


def engine_of(*, step_s: float, length: int, limits: Limits | None = None) -> LocalEngine:
    """Return an engine over the scripted model."""

    def answers(ids: tuple[int, ...]) -> list[int]:
        return list(answer_to(ByteCodec().decode(ids), length).encode())

    backend = _Backend(answers, step_s=step_s)
    return LocalEngine.over(backend, ByteCodec(), defaults=PARAMS, limits=limits)


def url_of(server: Server) -> str:
    """Return the address of its websocket."""
    return f"ws://127.0.0.1:{server.port}/v1/stream"


async def until_forgotten(server: Server) -> None:
    """Wait until the server holds no stream and no connection any more."""
    # Nobody tells when the last one is forgotten.
    while server.registry.num_retained or server.gateway.num_connections:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    gc.collect()


def rss_mb() -> float:
    """Return the resident memory of this process, MB."""
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)
