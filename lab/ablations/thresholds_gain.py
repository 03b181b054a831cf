"""What the joint threshold gains over the plain one, decoded on the same problems.

    python -m lab.ablations.thresholds_gain bench/ablations/thresholds.jsonl

Intervals hold 95 % of 2,000 resamplings of the problems; one resampling serves all settings, since
settings differ less on the same problems than on others.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lab.ablations.thresholds_plot import USUAL

__all__ = ["Curves", "main", "tables"]

Floats = NDArray[np.float64]

RESAMPLINGS: Final = 2_000
SEED: Final = 0
SHARES: Final = (2.5, 97.5)
RULES: Final = ("token", "joint")
FACTOR: Final = ("factor", 1.0)


@dataclass(frozen=True, slots=True)
class Curves:
    """Scores and speeds over all resamplings; the first row is the problems as they are.

    Attributes:
        settings: block size, rule and threshold of each column.
        accuracy: [1 + R, S] in percent.
        speed: [1 + R, S] in tokens per step.
    """

    settings: list[tuple[int, str, float]]
    accuracy: Floats
    speed: Floats

    @classmethod
    def of(cls, points: Sequence[dict[str, Any]]) -> "Curves":
        """Resample records of `thresholds` that hold each problem.

        Raises:
            SystemExit: there are none, or they are not of the same problems.
        """
        lengths = {len(point.get("right", "")) for point in points}
        if len(lengths) != 1 or 0 in lengths:
            raise SystemExit(
                "the records must hold each problem, and all the same ones; decode them again into "
                "a new file"
            )
        [number] = lengths
        right = np.array([[int(ok) for ok in point["right"]] for point in points])
        tokens = np.array([point["tokens"] for point in points])
        steps = np.array([point["steps"] for point in points])
        drawn = np.random.default_rng(SEED).multinomial(
            number, [1 / number] * number, size=RESAMPLINGS
        )
        counts = np.concatenate([np.ones((1, number)), drawn])
        settings = [
            (int(s["block_size"]), str(s["acceptance"]), float(s["confidence_threshold"]))
            for s in (point["setting"] for point in points)
        ]
        accuracy = 100 * (counts @ right.T) / number
        return cls(settings, accuracy, (counts @ tokens.T) / (counts @ steps.T))

    def point(self, size: int, rule: str, value: float) -> tuple[Floats, Floats]:
        """Return [1 + R] scores and [1 + R] tokens per step of a setting."""
        column = self.settings.index((size, rule, value))
        return self.accuracy[:, column], self.speed[:, column]

    def plain_at(self, size: int, speed: Floats) -> Floats:
        """Return [1 + R] scores of the plain threshold at [1 + R] tokens per step.

        NaN where no plain threshold is as slow or as fast.
        """
        chosen = [i for i, (s, rule, _) in enumerate(self.settings) if (s, rule) == (size, "token")]
        rows = []
        for x, y, at in zip(self.speed[:, chosen], self.accuracy[:, chosen], speed, strict=True):
            order = np.argsort(x)
            rows.append(np.interp(at, x[order], y[order], left=np.nan, right=np.nan))
        return np.array(rows)


def tables(records: Sequence[Path]) -> str:
    """Return Markdown: rules against the plain one, and how far scores fall with the block size."""
    lines = [line for path in records for line in path.read_text(encoding="utf-8").splitlines()]
    points = [p for p in map(json.loads, lines) if USUAL.items() <= p["setting"].items()]
    curves = Curves.of(points)
    sizes = sorted({size for size, _, _ in curves.settings})
    values = sorted({value for _, rule, value in curves.settings if rule == "token"})
    text = "| blocks of | above | each | together | at equal tokens per step | in speed, % |\n"
    text += f"|{'---|' * 6}\n"
    for size in sizes:
        for value in values:
            (plain, fast), (joint, slow) = (curves.point(size, rule, value) for rule in RULES)
            text += (
                f"| {size} | {value:g} | {plain[0]:.1f} at {fast[0]:.1f} | "
                f"{joint[0]:.1f} at {slow[0]:.1f} | "
                f"{_interval(joint - curves.plain_at(size, slow))} | "
                f"{_interval(100 * (slow / fast - 1))} |\n"
            )
        if (size, *FACTOR) in curves.settings:
            score, speed = curves.point(size, *FACTOR)
            gain = _interval(score - curves.plain_at(size, speed))
            text += f"| {size} | factor rule | | {score[0]:.1f} at {speed[0]:.1f} | {gain} | |\n"
    text += "\n| above | fall of each | fall of together | difference |\n|---|---|---|---|\n"
    for value in values:
        falls = [
            curves.point(sizes[0], rule, value)[0] - curves.point(sizes[-1], rule, value)[0]
            for rule in RULES
        ]
        cells = " | ".join(map(_interval, [*falls, falls[0] - falls[1]]))
        text += f"| {value:g} | {cells} |\n"
    return text


def _interval(values: Floats) -> str:
    """Return the figure and its interval; a dash if it lies outside what can be compared."""
    if np.isnan(values[0]) or np.isnan(values).mean() > 1 - (SHARES[1] - SHARES[0]) / 100:
        return "\N{EN DASH}"
    low, high = np.nanpercentile(values[1:], SHARES)
    return f"{values[0]:+.1f} ({low:+.1f} to {high:+.1f})".replace("-", "\N{MINUS SIGN}")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables of records."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.ablations.thresholds_gain", description=__doc__
    )
    parser.add_argument("records", type=Path, nargs="+", help="of thresholds")
    sys.stdout.write(tables(parser.parse_args(argv).records))


if __name__ == "__main__":
    main()
