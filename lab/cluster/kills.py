"""Engines and servers that are killed at random while answers are read through a balancer."""

import asyncio
import random
import time
from pathlib import Path
from typing import Any, Final

from lab.cluster.ray_engines import RayEngines, ray_engines, write_paced_model
from lab.cluster.readers import connections, keep_reading
from lab.cluster.servers import Balancer, ServerProcess, open_store, start_server

__all__ = ["kills"]

ANSWER: Final = ("block diffusion writes whole blocks; " * 9)[:328]
STEP_MS: Final = 20.0
STREAMS: Final = 16
SEED: Final = 1


async def kills(folder: Path, *, seconds: float, waits: bool) -> dict[str, Any]:
    """Kill engines and servers, now one and now both, for so long.

    Args:
        folder: for the model.
        seconds: how long.
        waits: until both engines are back, before the next kill; else there may be none for a
            while, until Ray has started one.

    Raises:
        RuntimeError: a reader lost, or saw twice, or in another order, or saw something else.
    """
    model = write_paced_model(folder / "paced", ANSWER, step_ms=STEP_MS)
    until = asyncio.Event()
    async with (
        open_store() as log,
        ray_engines(model, log) as engines,
        Balancer().listening() as balancer,
    ):
        servers = Servers(engines, log, balancer)
        try:
            await servers.start()
            await servers.start()
            async with connections(f"ws://127.0.0.1:{balancer.port}", 4) as clients:
                reading = asyncio.create_task(
                    keep_reading(clients, ANSWER, streams=STREAMS, until=until)
                )
                counts = await _kill(engines, servers, reading, seconds, waits=waits)
                until.set()
                readings = await reading
        finally:
            await servers.close()
    pauses = sorted(answer.longest_pause_ms for answer in readings)
    return {
        "kills": counts,
        "answers": len(readings),
        "blocks": sum(answer.num_blocks for answer in readings),
        "lost_doubled_or_reordered": 0,  # a reader raises
        "longest_pause_ms": {
            "median": round(pauses[len(pauses) // 2]),
            "p90": round(pauses[len(pauses) * 9 // 10]),
            "max": round(pauses[-1]),
        },
    }


async def _kill(
    engines: RayEngines,
    servers: "Servers",
    reading: "asyncio.Task[Any]",
    seconds: float,
    *,
    waits: bool,
) -> dict[str, int]:
    chosen, counts = random.Random(SEED), {"engine": 0, "server": 0, "both": 0}
    began = time.perf_counter()
    while time.perf_counter() - began < seconds and not reading.done():
        await asyncio.sleep(chosen.uniform(0.3, 1.5))
        what = chosen.choice(sorted(counts))
        if waits:
            await engines.wait_alive(2)
        if what != "server":
            if not engines.pids():  # Serve has yet to start another one
                continue
            engines.kill_one(number=chosen.randrange(8))
        if what != "engine":
            await servers.replace()
        counts[what] += 1
    return counts


class Servers:
    """Two servers, of which the balancer leads to the older one."""

    def __init__(self, engines: RayEngines, log: str, balancer: Balancer) -> None:
        self._engines = engines
        self._log = log
        self._balancer = balancer
        self._living: list[ServerProcess] = []

    async def start(self) -> None:
        """Start one more."""
        arguments = ["--engines", self._engines.url, "--log", self._log]
        self._living.append(await start_server(arguments, self._engines.environment))
        self._balancer.target = self._living[0].port

    async def replace(self) -> None:
        """Kill the one that is read from; readers go to the other, and a new one is started."""
        await self._living.pop(0).kill()
        self._balancer.target = self._living[0].port
        await self.start()

    async def close(self) -> None:
        """Kill all."""
        for server in self._living:
            await server.kill()
