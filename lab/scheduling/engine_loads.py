"""The engine itself under load: windows that may narrow against fixed ones, in turns.

A closed loop, as in the simulations. Every setting has its turn at every load before the next turn
begins, so that a drift of the machine's speed falls on all alike; the best turn of each counts, as
the machine is shared.
"""

import asyncio
import json
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
    found: dict[str, dict[int, list[dict[str, float]]]] = {}
    for _ in range(turns):
        for name, changes in settings.items():
            async with d2f_stream.load(
                model, adapter=adapter, limits=Limits(max_sessions=max(loads))
            ) as engine:
                asked: ParamOverrides = {**common, **changes}
                await engine.generate(prompts[0], **asked).result()
                for load in loads:
                    turn = await _turn(engine, prompts, asked, load)
                    found.setdefault(name, {}).setdefault(load, []).append(turn)
    return {
        name: {
            str(load): max(turns_of, key=lambda turn: turn["tokens_per_s"])
            for load, turns_of in by_load.items()
        }
        for name, by_load in found.items()
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
            result = await engine.generate(waiting.pop(), **asked).result()
            tokens.append(result.usage.completion_tokens)
            steps.append(result.usage.steps)
            first_ms.append(result.timings.first_block_ms or 0.0)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(num_clients)))
    wall_s = time.perf_counter() - began
    return {
        "tokens_per_s": round(sum(tokens) / wall_s, 1),
        "first_block_ms": round(sum(first_ms) / len(first_ms), 1),
        "tokens_per_step": round(sum(tokens) / sum(steps), 3),
        "answers": len(tokens),
    }
