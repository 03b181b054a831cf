"""What each part of a cluster spends of its processor on an answer, on a block and on waiting.

Processor time, so that what else runs on the machine counts little. Answers of two lengths tell the
share of an answer from that of a block.
"""

import asyncio
import os
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from d2f_stream.server.limits import ServeLimits
from d2f_stream.wire.protocol import Generate
from lab.cluster.ray_engines import RayEngines, ray_engines, write_paced_model
from lab.cluster.readers import after, connections, keep_reading
from lab.cluster.servers import ServerProcess, open_store, start_server

__all__ = ["costs", "shares"]

ANSWER: Final = ("block diffusion writes whole blocks; " * 9)[:328]
BLOCK_SIZE: Final = 8
SHORT_BLOCKS: Final = 5
STREAMS: Final = 64
STEP_MS: Final = 2.0
NUM_WAITING: Final = 200


async def costs(folder: Path, *, seconds: float) -> dict[str, Any]:
    """Measure with two engines, one server and a store, each length for so many seconds."""
    model = write_paced_model(folder / "paced", ANSWER, step_ms=STEP_MS)
    async with open_store() as log:
        async with ray_engines(model, log) as engines:
            arguments = ["--engines", engines.url, "--log", log, "--max-running", str(STREAMS)]
            server = await start_server(arguments, engines.environment)
            try:
                parts = _Parts(log, server, engines)
                short = await _answers(parts, ANSWER[: BLOCK_SIZE * SHORT_BLOCKS], seconds)
                whole = await _answers(parts, ANSWER, seconds)
            finally:
                await server.kill()
        waiting = await _waiting(log, seconds)
    return {
        "streams": STREAMS,
        "engines": 2,
        "servers": 1,
        "short": short,
        "long": whole,
        "cpu_us": {
            part: shares(
                (short["blocks"], short["cpu_us_per_answer"][part]),
                (whole["blocks"], whole["cpu_us_per_answer"][part]),
            )
            for part in whole["cpu_us_per_answer"]
        },
        "store_us_per_running_stream_and_s": waiting,
    }


def shares(short: tuple[int, float], whole: tuple[int, float]) -> dict[str, float]:
    """Return what an answer and what a block costs, from two answers' blocks and costs."""
    block = (whole[1] - short[1]) / (whole[0] - short[0])
    return {"answer": round(short[1] - short[0] * block, 1), "block": round(block, 1)}


@dataclass(frozen=True)
class _Parts:
    """The processes whose time counts."""

    log: str
    server: ServerProcess
    engines: RayEngines

    def cpu_s(self) -> Mapping[str, float]:
        """Return what each has spent since it began, seconds."""
        return {
            "store": _store_cpu_s(self.log),
            "server": _cpu_s(self.server.process.pid),
            "engine": sum(_cpu_s(pid) for pid in self.engines.pids()),
        }


async def _answers(parts: _Parts, answer: str, seconds: float) -> dict[str, Any]:
    url = f"ws://127.0.0.1:{parts.server.port}"
    async with connections(url, 4) as clients:
        async with after(0.5) as warm:
            await keep_reading(clients, answer, streams=STREAMS, until=warm)
        before = parts.cpu_s()
        async with after(seconds) as over:
            readings = await keep_reading(clients, answer, streams=STREAMS, until=over)
        spent = {part: cpu_s - before[part] for part, cpu_s in parts.cpu_s().items()}
    return {
        "answers": len(readings),
        "blocks": readings[0].num_blocks,
        "cpu_us_per_answer": {
            part: round(1e6 * cpu_s / len(readings)) for part, cpu_s in spent.items()
        },
    }


async def _waiting(url: str, seconds: float) -> float:
    """Return what the store spends on a stream's lease and reader, microseconds a second."""
    from d2f_stream.server.streams.valkey.log import ValkeyLog  # wants the extra "log"

    async with AsyncExitStack() as stack:
        worker, reader = [
            await stack.enter_async_context(ValkeyLog(url, ServeLimits())) for _ in range(2)
        ]
        for number in range(NUM_WAITING):
            asked = Generate(request_id=f"waiting-{number}", prompt="hi")
            stream, _ = await worker.create(asked, client="ann", asker="ann", clamp=False)
            await reader.find(stream.id, client="ann")
            work = await worker.work(stream.id)
            assert work is not None
            await stack.enter_async_context(work)
        before = _store_cpu_s(url)
        await asyncio.sleep(seconds)
        return round(1e6 * (_store_cpu_s(url) - before) / seconds / NUM_WAITING, 1)


def _store_cpu_s(url: str) -> float:
    """Return what the thread that answers has spent, seconds: there is one."""
    from valkey import Valkey

    with Valkey.from_url(url) as client:
        used = client.info("cpu")
    return float(used["used_cpu_sys_main_thread"]) + float(used["used_cpu_user_main_thread"])


def _cpu_s(pid: int) -> float:
    """Return what a process has spent, seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
