"""The figure and the tables of ablation studies: every setting against the published one.

Teachers differ more than most settings do, so that runs are compared in pairs of one seed, which
share teacher, problems and noise; the figure shows nothing but these differences.
"""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lab.ablations.settings import AS_PUBLISHED, PUBLISHED, STUDIES

__all__ = ["is_ablation", "plot_ablations", "tables"]

Record = dict[str, Any]
Runs = Mapping[tuple[str, int], Record]  # by setting and seed

# Colours that people with any colour vision tell apart (Okabe and Ito).
SERIES: Final = {16: "#0072b2", 32: "#d55e00"}
MARKERS: Final = "osD^vP"  # of the teachers
ACTIVE: Final = 4  # of the points, the figure shows those with so many active blocks
POINTS: Final = {(16, 4): "16, four", (16, 1): "16, one", (32, 4): "32, four", (32, 1): "32, one"}
WIDEST: Final = 16.0  # points of accuracy; a difference beyond is written, not drawn
STUDENT_T: Final = (4.30, 3.18, 2.78, 2.57, 2.45, 2.36)  # 97.5 % of it, from two degrees of freedom
APART: Final = 0.34  # of the two series of a row; rows are 1 apart


def is_ablation(path: Path) -> bool:
    """Whether a file holds records of studies."""
    with path.open(encoding="utf-8") as file:
        return '"points"' in file.readline()


def plot_ablations(records: Sequence[Path], output: Path) -> None:
    """Draw how accuracy and tokens per step of each setting differ from the published one.

    Args:
        records: JSON-lines files of `ablate`.
        output: the picture; its suffix chooses the format.

    Raises:
        SystemExit: there is nothing to compare.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = _read(records)
    rows = [(study, name) for study, names in _studies(runs) for name in names]
    rows = [row for row in rows if row[1] != PUBLISHED]
    if not rows:
        raise SystemExit("no setting shares a seed with the published one; run more of a study")
    height = 1.3 + 0.42 * len(rows)
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, height), layout="constrained", sharey=True, width_ratios=(3, 2)
    )
    for place, (_, setting) in enumerate(rows):
        _draw_row(left, runs, setting, place, "accuracy", 100.0, widest=WIDEST)
        _draw_row(right, runs, setting, place, "tokens_per_step", 1.0)
    left.set_yticks(range(len(rows)), [f"{study}: {setting}" for study, setting in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.set_xlim(-WIDEST, WIDEST)
    left.set_xlabel("right answers, points above the published setting")
    right.set_xlabel("tokens per step above it")
    for axes in (left, right):
        axes.axvline(0.0, color="black", linewidth=0.8, zorder=0)
        for place in range(1, len(rows)):
            if rows[place][0] != rows[place - 1][0]:
                axes.axhline(place - 0.5, color="#bbbbbb", linewidth=0.8)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    _add_legend(figure, _teachers(runs))
    figure.savefig(output, dpi=144)
    pyplot.close(figure)


def tables(records: Sequence[Path]) -> str:
    """Return a Markdown table for each study: figures, and differences from the published setting.

    A figure is the mean of a run's four points, and of the runs of one teacher; there is one for
    each teacher. Differences have their mean before them, with half of its 95 % interval, for
    teachers that are a sample of all.
    """
    runs, text = _read(records), ""
    teachers = _teachers(runs)
    for study, names in _studies(runs):
        text += f"{study}: {', '.join(teachers)}\n\n| setting |"
        text += " right, % | against published | tokens per step | against published |\n"
        text += f"|{'---|' * 5}\n"
        for name in names:
            text += f"| {_label(study, name)} |"
            for measure, factor in (("accuracy", 100.0), ("tokens_per_step", 1.0)):
                values = _by_teacher(runs, name, measure, factor, against=False)
                gains = _by_teacher(runs, name, measure, factor, against=True)
                gain = "" if name == PUBLISHED else _gain(gains, teachers)
                text += f" {_each(values, teachers)} | {gain} |"
            text += "\n"
        text += "\n"
    return text


def _read(records: Sequence[Path]) -> Runs:
    lines = [line for path in records for line in path.read_text(encoding="utf-8").splitlines()]
    return {(run["setting"], int(run["seed"])): run for run in map(json.loads, lines)}


def _studies(runs: Runs) -> Iterator[tuple[str, list[str]]]:
    """Yield each study with those of its settings that share a seed with the published one."""
    for study, names in STUDIES.items():
        kept = [name for name in names if _shared(runs, [name, PUBLISHED])]
        if len(kept) > 1:
            yield study, kept


def _shared(runs: Runs, names: Sequence[str]) -> list[int]:
    """Return the seeds that all of these settings were run with."""
    seeds = sorted({seed for _, seed in runs})
    return [seed for seed in seeds if all((name, seed) in runs for name in names)]


def _draw_row(
    axes: Any,
    runs: Runs,
    setting: str,
    place: int,
    measure: str,
    factor: float,
    *,
    widest: float = float("inf"),
) -> None:
    """Draw a marker for each seed and a bar for the teachers' mean, or write what is too far."""
    far, teachers = [], _teachers(runs)
    for number, (size, colour) in enumerate(SERIES.items()):
        at = place + APART * (number - 0.5)
        seeds = _shared(runs, [setting, PUBLISHED])
        values = [
            factor
            * (
                _value(runs[setting, seed], (size, ACTIVE), measure)
                - _value(runs[PUBLISHED, seed], (size, ACTIVE), measure)
            )
            for seed in seeds
        ]
        if max(map(abs, values)) > widest:
            far.append(f"{', '.join(f'{value:+.0f}' for value in values)} (blocks of {size})")
            continue
        for seed, value in zip(seeds, values, strict=True):
            marker = _marker(teachers, _teacher(runs[setting, seed]))
            axes.plot(value, at, marker=marker, color=colour, markerfacecolor="none", markersize=6)
        of_teacher: dict[str, list[float]] = {}
        for seed, value in zip(seeds, values, strict=True):
            of_teacher.setdefault(_teacher(runs[setting, seed]), []).append(value)
        mean = statistics.mean(map(statistics.mean, of_teacher.values()))
        axes.vlines(mean, at - 0.15, at + 0.15, color=colour, linewidth=3)
    if far:
        text = "too far to draw: " + "; ".join(far).replace("-", "\N{MINUS SIGN}")
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(0.4 - widest, place, text, va="center", fontsize=8, bbox=white)


def _marker(teachers: Sequence[str], teacher: str) -> str:
    return MARKERS[teachers.index(teacher) % len(MARKERS)]


def _add_legend(figure: Any, teachers: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, linewidth=3, label=f"blocks of {size}, mean")
        for size, colour in SERIES.items()
    ]
    handles += [
        Line2D([], [], linestyle="", color="black", markerfacecolor="none",
               marker=_marker(teachers, teacher), label=teacher.replace("-", " "))
        for teacher in teachers
    ]  # fmt: skip
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False,
        columnspacing=1.2, handlelength=1.4,
    )  # fmt: skip


def _label(study: str, setting: str) -> str:
    return AS_PUBLISHED[study] if setting == PUBLISHED else setting


def _value(run: Record, point: tuple[int, int], measure: str) -> float:
    """Return the measure of a run at a block size with so many active blocks."""
    [value] = [
        float(p[measure])
        for p in run["points"]
        if (p["block_size"], p["max_active_blocks"]) == point
    ]
    return value


def _teacher(run: Record) -> str:
    return str(run["teacher"])


def _teachers(runs: Runs) -> list[str]:
    """Return those that the published setting was run with, in order of its seeds."""
    seeds = _shared(runs, [PUBLISHED])
    return list(dict.fromkeys(_teacher(runs[PUBLISHED, seed]) for seed in seeds))


def _by_teacher(
    runs: Runs, setting: str, measure: str, factor: float, *, against: bool
) -> dict[str, float]:
    """Return for each teacher a setting's measure, or how far it is above the published one."""
    found: dict[str, list[float]] = {}
    for seed in _shared(runs, [setting, PUBLISHED]):
        run, other = runs[setting, seed], runs[PUBLISHED, seed]
        value = statistics.mean(
            _value(run, point, measure) - against * _value(other, point, measure)
            for point in POINTS
        )
        found.setdefault(_teacher(run), []).append(factor * value)
    return {teacher: statistics.mean(values) for teacher, values in found.items()}


def _each(values: Mapping[str, float], teachers: Sequence[str], sign: str = "") -> str:
    """Return the figure of each teacher, a dash where there is none."""
    cells = [f"{values[name]:{sign}.1f}" if name in values else "\N{EN DASH}" for name in teachers]
    return " / ".join(cells).replace("-", "\N{MINUS SIGN}")


def _gain(values: Mapping[str, float], teachers: Sequence[str]) -> str:
    """Return the mean over the teachers, half of its interval if there is one, and each."""
    text = f"{statistics.mean(values.values()):+.1f}".replace("-", "\N{MINUS SIGN}")
    if len(values) > 2:  # two say next to nothing of their spread
        error = statistics.stdev(values.values()) / math.sqrt(len(values))
        text += f" \N{PLUS-MINUS SIGN} {STUDENT_T[len(values) - 3] * error:.1f}"
    return f"{text} ({_each(values, teachers, '+')})"
