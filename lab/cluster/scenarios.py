"""Clusters of 1, 10 and 100 engines, simulated by figures of the records of this repository."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from lab.cluster.simulation import Costs, EngineModel, carried, simulate

__all__ = ["scenarios"]

BENCH: Final = Path(__file__).resolve().parents[2] / "bench"
LOAD: Final = 0.8
"""Of the answers that engines make when they are full."""
SERVERS_BUSY: Final = 0.7
"""With enough servers, each is as busy as that at most."""
SCRIPTED_BLOCKS: Final = 41
MAX_SESSIONS: Final = 32
LARGE_BLOCK: Final = 32
LARGE_ANSWER: Final = 256
NUM_ANSWERS: Final = 2_000
"""Of a simulation at least, half of them counted, and each engine's places taken four times."""
SOURCES: Final = {
    "costs": "cluster-costs.json: cpu_us of server, store and engine, by answer and by block; "
    "store_us_per_running_stream_and_s",
    "scripted": "cluster.json: cluster, 1 stream, blocks_per_s, for each answer, up to what a core "
    "of an engine has time for (cluster-costs.json); answers of 41 blocks",
    "8B, one answer at a time": "stream-h100.json: llada-8b fp8, 2.9 tokens a step, "
    "decode_tokens_per_second; blocks of 32, answers of 256 tokens",
    "8B, up to 64": "scheduling/simulated.json: h200-bf16, d2f-2.9, pays, tokens_per_s by clients; "
    "blocks of 32, answers of 256 tokens",
}


def scenarios(numbers: Sequence[int] = (1, 10, 100), *, bench: Path = BENCH) -> dict[str, Any]:
    """Return each kind of engine in each number, with one server and with enough of them."""
    costs = _costs(bench)
    found: dict[str, Any] = {"load": LOAD, "sources": SOURCES, "most_per_s": _most_per_s(costs)}
    for name, model in _models(bench).items():
        most = carried(costs, model, load=LOAD)
        found[name] = {
            "full_engine": {
                "answers_per_s": round(model.answers_per_s, 2),
                "blocks_per_s": round(model.paces[-1][1], 1),
            },
            "engines_carried": {part: round(number, 1) for part, number in most.items()},
            "engines": {
                str(number): [
                    _run(costs, model, engines=number, servers=servers)
                    for servers in sorted({1, _enough(number, most["server"])})
                ]
                for number in numbers
            },
        }
    return found


def _enough(engines: int, carried_by_one: float) -> int:
    return math.ceil(engines / (SERVERS_BUSY * carried_by_one))


def _most_per_s(costs: Costs) -> dict[str, int]:
    """Return what a core does in a second that has nothing else to do."""
    return {name: round(1e6 / us) for name, us in vars(costs).items() if name != "store_running_s"}


def _run(costs: Costs, model: EngineModel, *, engines: int, servers: int) -> dict[str, Any]:
    answers_per_s = LOAD * engines * model.answers_per_s
    answer_s = model.sessions / model.answers_per_s
    seconds = max(4 * answer_s, NUM_ANSWERS / answers_per_s)
    outcome = simulate(
        costs,
        model,
        engines=engines,
        servers=servers,
        answers_per_s=answers_per_s,
        seconds=seconds,
    )
    asked = {"servers": servers, "answers_per_s": round(answers_per_s, 1)}
    return {**asked, "simulated_s": round(seconds, 1), **outcome.to_dict()}


def _costs(bench: Path) -> Costs:
    results = _results(bench / "cluster-costs.json")
    cpu = results["cpu_us"]
    return Costs(
        server_answer=cpu["server"]["answer"],
        server_block=cpu["server"]["block"],
        store_answer=cpu["store"]["answer"],
        store_block=cpu["store"]["block"],
        store_running_s=results["store_us_per_running_stream_and_s"],
    )


def _models(bench: Path) -> dict[str, EngineModel]:
    alone = _results(bench / "cluster.json")["cluster"]["1"]["blocks_per_s"]
    engine = _results(bench / "cluster-costs.json")["cpu_us"]["engine"]
    on_a_core = 1e6 / (engine["block"] + engine["answer"] / SCRIPTED_BLOCKS)
    at_once = range(1, MAX_SESSIONS + 1)
    one = _results(bench / "stream-h100.json")["llada-8b fp8, 2.9 tokens a step"]
    loads = _results(bench / "scheduling" / "simulated.json")["h200-bf16, d2f-2.9"]["loads"]
    blocks = LARGE_ANSWER // LARGE_BLOCK
    return {
        "scripted": EngineModel(
            paces=tuple((number, min(number * alone, on_a_core)) for number in at_once),
            answer_blocks=SCRIPTED_BLOCKS,
        ),
        "8B, one answer at a time": EngineModel(
            paces=((1, one["decode_tokens_per_second"] / LARGE_BLOCK),), answer_blocks=blocks
        ),
        "8B, up to 64": EngineModel(
            paces=tuple(
                (each["clients"], each["pays"]["tokens_per_s"] / LARGE_BLOCK) for each in loads
            ),
            answer_blocks=blocks,
        ),
    }


def _results(path: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["results"]
    return results
