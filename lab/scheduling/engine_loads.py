"""The engine itself under load: windows that may narrow against fixed ones, in turns.

A closed loop, as in the simulations. Settings take turns, so that a drift of the machine's speed
falls on all alike, and the medians of the turns count. Where others share the machine, tokens for a
second of this process's own time say more than those for a second of the clock.
"""

import asyncio
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import d2f_stream
from d2f_stream.core.limits import Limits
from d2f_stream.core.params import ParamOverrides
from d2f_stream.core.session import Engine

__all__ = ["PIPELINE", "VERIFIED", "run_engine"]

LEAST_REQUESTS: Final = 8
PROMPTS: Final = Path("bench/prompts.jsonl")

PIPELINE: Final[Mapping[str, ParamOverrides]] = {
    "pays": {"may_narrow": True},
    "4 blocks": {},
    "2 blocks": {"max_active_blocks": 2},
    "1 block": {"max_active_blocks": 1},
}
"""Settings of the embedded model, over four blocks of 16."""
VERIFIED: Final[Mapping[str, ParamOverrides]] = {
    "pays": {},
    "one token": {"block_size": 1, "commit": "filled"},
}
"""Settings of a model whose answers are verified."""


async def run_engine(
    model: str | None,
    *,
    adapter: str | None,
    loads: Sequence[int],
    turns: int,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Return tokens per second and first blocks of each setting at each load."""
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    common: ParamOverrides = {"max_new_tokens": max_new_tokens}
    if model is None:
        common |= {"block_size": 16, "max_active_blocks": 4, "add_threshold": 0.1}
    settings = PIPELINE if model is None else VERIFIED
    found: dict[int, dict[str, list[dict[str, float]]]] = {}
    limits = Limits(max_sessions=max(loads))
    async with d2f_stream.load(model, adapter=adapter, limits=limits) as engine:
        for load in loads:
            of_load = found.setdefault(load, {name: [] for name in settings})
            for _ in range(turns):
                for name, changes in settings.items():
                    asked: ParamOverrides = {**common, **changes}
                    of_load[name].append(await _turn(engine, prompts, asked, load))
    return {
        str(load): {
            name: {key: round(statistics.median(t[key] for t in of), 3) for key in of[0]}
            for name, of in of_load.items()
        }
        for load, of_load in found.items()
    }


async def _turn(
    engine: Engine, prompts: Sequence[str], asked: ParamOverrides, num_clients: int
) -> dict[str, float]:
    """Answer prompts by so many clients at once."""
    num_requests = max(LEAST_REQUESTS, num_clients)
    waiting = [prompts[number % len(prompts)] for number in range(num_requests)]
    tokens: list[int] = []
    first_ms: list[float] = []
    steps: list[int] = []

    async def client() -> None:
        while waiting:
            result = await engine.generate(waiting.pop(), raw=True, **asked).result()
            tokens.append(result.usage.completion_tokens)
            steps.append(result.usage.steps)
            first_ms.append(result.timings.first_block_ms or 0.0)

    began, own_began = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client() for _ in range(num_clients)))
    wall_s, own_s = time.perf_counter() - began, time.process_time() - own_began
    return {
        "tokens_per_s": sum(tokens) / wall_s,
        "tokens_per_own_s": sum(tokens) / own_s,
        "first_block_ms": sum(first_ms) / len(first_ms),
        "tokens_per_step": sum(tokens) / sum(steps),
        "answers": len(tokens),
    }
