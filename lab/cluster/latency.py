"""What a block costs more on its way from an engine of a cluster than from one in the process."""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from lab.cluster.ray_engines import ray_engines, write_paced_model
from lab.cluster.readers import after, connections, keep_reading
from lab.cluster.servers import ServerProcess, open_store, start_server

__all__ = ["SETUPS", "latency"]

ANSWER: Final = ("block diffusion writes whole blocks; " * 9)[:328]
STEP_MS: Final = 2.0
QUESTION: Final = (
    "For a party, Ivan gets 33 mugs. Kenji takes 4 of them home. Then he donates 3 mugs to a "
    "school. He gives 8 mugs to Kenji, and then he splits the rest into 2 equal piles and keeps "
    "one. How many mugs does Ivan end up with?"
)
MAX_NEW_TOKENS: Final = 160
ROOM: Final = ("--max-running", "64")  # else clients take turns
SETUPS: Final = ("process", "process with a log", "handle", "cluster", "two servers")


async def latency(
    folder: Path, *, setups: Sequence[str], loads: Sequence[int], seconds: float, model: str = ""
) -> dict[str, Any]:
    """Measure the setups under loads of so many streams at once.

    Args:
        folder: for a scripted model.
        setups: of `SETUPS`.
        loads: numbers of streams.
        seconds: for each load.
        model: one that is installed, instead of the scripted one; it must answer alike each time.
    """
    path = Path(model) if model else write_paced_model(folder / "paced", ANSWER, step_ms=STEP_MS)
    question = QUESTION if model else ""
    found: dict[str, Any] = {}
    for setup in setups:
        async with _serving(setup, path) as servers:
            ports = [server.port for server in servers]
            found[setup] = {
                str(load): await _measure(ports, load, seconds, question) for load in loads
            }
    return found


async def _measure(
    ports: Sequence[int], streams: int, seconds: float, question: str
) -> dict[str, Any]:
    urls = [f"ws://127.0.0.1:{port}" for port in ports]
    async with connections(urls[0], 2) as first, connections(urls[-1], 2) as second:
        engines = [*first, *second]
        answer, most = ANSWER, 0
        if question:
            most = MAX_NEW_TOKENS
            session = engines[0].generate(question, max_new_tokens=most, raw=True)
            answer = (await session.result()).text
        read = partial(keep_reading, engines, answer, prompt=question, max_new_tokens=most)
        async with after(0.5) as warm:
            await read(streams=streams, until=warm)
        began = time.perf_counter()
        async with after(seconds) as over:
            readings = await read(streams=streams, until=over)
        wall_s = time.perf_counter() - began
    return {
        "answers": len(readings),
        "blocks_per_s": round(sum(reading.num_blocks for reading in readings) / wall_s),
        "added_ms": _percentiles([reading.added_ms for reading in readings]),
        "block_lateness_ms": _percentiles(
            [late for reading in readings for late in reading.lateness_ms]
        ),
    }


@asynccontextmanager
async def _serving(setup: str, model: Path) -> AsyncIterator[list[ServerProcess]]:
    servers: list[ServerProcess] = []
    try:
        async with open_store() as log:
            if setup.startswith("process"):
                logged = ["--log", log] if "log" in setup else []
                servers.append(await start_server(["--model", str(model), *logged, *ROOM]))
                yield servers
                return
            uses_log = setup != "handle"
            async with ray_engines(model, log if uses_log else "") as engines:
                logged = ["--log", log] if uses_log else []
                arguments = ["--engines", engines.url, *logged, *ROOM]
                number = 2 if setup == "two servers" else 1
                servers += [
                    await start_server(arguments, engines.environment) for _ in range(number)
                ]
                yield servers
                for server in servers:
                    await server.kill()
    finally:
        for server in servers:
            await server.kill()


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        name: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)
        for name, share in (("p50", 0.5), ("p99", 0.99))
    }
