"""StepCurve: what steps took where they were measured; the clock of a simulation."""

import json
import random
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from d2f_runtime.engine.step_cost import TimedStep

__all__ = ["CURVES", "StepCurve"]

WARM: Final = (
    *((rows, 1) for rows in (1, 2, 4, 8, 16, 32, 128, 512)),
    (16, 16),
    (512, 8),
)
"""Rows and sessions of the steps that an engine times when it warms up."""


@dataclass(frozen=True)
class StepCurve:
    """Milliseconds by rows, straight between what was measured and straight on after it.

    Attributes:
        points: (rows, ms) of steps, ascending.
        session_ms: that each further session adds.
        source: where the points come from.
        one_by_one: whether sessions run one after the other, each as the points say.
    """

    points: Sequence[tuple[float, float]]
    session_ms: float
    source: str
    one_by_one: bool = False

    @classmethod
    def read(cls, path: Path) -> "StepCurve":
        """Return the curve of a record of `python -m lab.scheduling curve`."""
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
        steps, one_by_one = results["steps"], results.get("one_by_one", False)
        alone = sorted((rows, ms) for rows, sessions, ms in steps if sessions == 1)
        for number in reversed(range(len(alone) - 1)):  # fewer rows take no more: that was noise
            rows, ms = alone[number]
            alone[number] = rows, min(ms, alone[number + 1][1])
        flat = cls(alone, 0.0, path.name)
        extra = [(ms - flat._alone_ms(rows)) / (n - 1) for rows, n, ms in steps if n > 1]
        session_ms = max(0.0, statistics.median(extra or [0.0]))
        return cls(alone, session_ms, path.name, one_by_one)

    def to_dict(self) -> dict[str, Any]:
        """Return it for a record."""
        return {
            "points": [list(point) for point in self.points],
            "session_ms": round(self.session_ms, 4),
            "source": self.source,
            "one_by_one": self.one_by_one,
        }

    def ms(self, rows: float, sessions: int) -> float:
        """Return what a step takes."""
        if self.one_by_one:
            return sessions * self._alone_ms(rows / sessions)
        return self._alone_ms(rows) + self.session_ms * (sessions - 1)

    def ms_of(self, each: Sequence[int]) -> float:
        """Return what a step takes, of so many rows of each session."""
        if self.one_by_one:
            return sum(map(self._alone_ms, each))
        return self.ms(sum(each), len(each))

    def _alone_ms(self, rows: float) -> float:
        places = [place for place, _ in self.points]
        index = min(max(bisect_left(places, rows), 1), len(places) - 1)
        (first, low), (last, high) = self.points[index - 1], self.points[index]
        along = max(0.0, (rows - first) / (last - first))
        return low + (high - low) * along

    def warm(self, chance: random.Random) -> list[TimedStep]:
        """Return what warming up would find, with a twentieth of noise."""
        return [
            TimedStep(rows, sessions, self.ms(rows, sessions) * chance.uniform(0.95, 1.05))
            for rows, sessions in WARM
        ]


H200: Final = "one H200, 8B shape, 640 cached, bench stream and bench step at b391321"

CURVES: Final[dict[str, StepCurve]] = {
    "h200-bf16": StepCurve(
        ((1, 4.06), (32, 4.48), (128, 5.30), (184, 6.97), (385, 13.51), (660, 21.48)), 0.025, H200
    ),
    "h200-fp8": StepCurve(
        ((1, 2.48), (32, 2.64), (128, 3.23), (184, 4.35), (387, 8.06), (666, 14.01)), 0.025, H200
    ),
    "cpu-embedded": StepCurve(
        ((1, 1.79), (16, 3.541), (32, 5.088), (64, 8.177), (80, 9.997)),
        0.0,
        "the embedded model, int8, ONNX Runtime on two cores: bench/onnx/small-cpu.json",
        one_by_one=True,
    ),
}
"""By name. The last two points of the H200's are of four and eight sessions."""
