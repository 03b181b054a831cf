"""Windows that pay against fixed ones and against one token a step, over numbers of clients."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from d2f_runtime.decoding.width import Width
from d2f_stream.core.params import GenerationParams
from d2f_stream.core.presets import PRESETS
from lab.scheduling.curves import StepCurve
from lab.scheduling.simulation import Fixed, Outcome, Paying, kind_of, simulate
from lab.scheduling.workloads import Drafted, Filled, Workload

__all__ = ["LOADS", "WORKLOADS", "compare"]

LOADS: Final = (1, 2, 4, 8, 16, 32, 64)
LEAST_REQUESTS: Final = 24
EACH: Final = 3  # requests of a client

SINGLE: Final = Width(max_drafts=1)
DRAFTED: Final = Drafted(PRESETS["verified"], 0.72, spare_rows=256)
"""Drafts of 8 of which each is right as often as SmolLM2's adapter's, behind every place."""

SHORT: Final = PRESETS["verified"].with_overrides({"block_size": 3, "max_active_blocks": 1})
"""As the SmolLM2 package's own on CPUs."""

WORKLOADS: Final[dict[str, Workload]] = {
    "drafts": DRAFTED,
    "drafts-cpu": Drafted(PRESETS["verified"], 0.72, spare_rows=8),
    "drafts-of-3": Drafted(SHORT, 0.72, spare_rows=10),
    "d2f-2.9": Filled(GenerationParams(), 0.6, 4),
    "d2f-10": Filled(GenerationParams(), 0.97, 12),
    "d2f-10-of-16": Filled(GenerationParams(block_size=16), 0.97, 12),
}
"""By name: D2F's are called by the tokens of a step of four blocks of 32, or of 16."""


@dataclass(frozen=True)
class _Load:
    num_clients: int
    seed: int

    @property
    def num_requests(self) -> int:
        return max(LEAST_REQUESTS, EACH * self.num_clients)

    def run(self, planner: Fixed | Paying, workload: Workload, curve: StepCurve) -> Outcome:
        return simulate(
            planner,
            workload,
            curve,
            num_clients=self.num_clients,
            num_requests=self.num_requests,
            seed=self.seed,
        )


def compare(
    workload: Workload, curve: StepCurve, *, loads: Sequence[int] = LOADS, seed: int = 0
) -> list[dict[str, Any]]:
    """Return a row for each load: what pays, what is fixed, one token a step, and their ratios.

    One token a step is the same model's where answers are verified, and otherwise that of an
    autoregressive one whose steps take as long.
    """
    return list(_rows(workload, curve, loads, seed))


def _rows(
    workload: Workload, curve: StepCurve, loads: Sequence[int], seed: int
) -> Iterator[dict[str, Any]]:
    widths = kind_of(workload).widths
    for num_clients in loads:
        load = _Load(num_clients, seed)
        timed = curve.warm(random.Random(seed))
        apart = curve.one_by_one
        planner = Paying(workload, timed, num_clients, one_by_one=apart)
        pays = load.run(planner, workload, curve)
        fixed = {
            _name(width): load.run(
                Fixed(workload, timed, num_clients, width, one_by_one=apart), workload, curve
            )
            for width in widths
        }
        single = load.run(
            Fixed(DRAFTED, timed, num_clients, SINGLE, one_by_one=apart), DRAFTED, curve
        )
        best = max(fixed.values(), key=lambda outcome: outcome.tokens_per_s)
        yield {
            "clients": num_clients,
            "pays": pays.to_dict(),
            "fixed": {name: outcome.to_dict() for name, outcome in fixed.items()},
            "one_token": single.to_dict(),
            "pays_to_best_fixed": round(pays.tokens_per_s / best.tokens_per_s, 3),
            "pays_to_own_width": round(pays.tokens_per_s / fixed["own"].tokens_per_s, 3),
            "pays_to_one_token": round(pays.tokens_per_s / single.tokens_per_s, 3),
        }


def _name(width: Width) -> str:
    if width.max_drafts is not None:
        return f"{width.max_drafts} drafts"
    if width.part_size is not None:
        return f"{width.part_size} tokens"
    return "own" if width.max_active_blocks is None else f"{width.max_active_blocks} blocks"
