"""Figures and tables of ablation studies: a dot for each seed, a bar for their mean."""

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from d2f_export.ablations import AS_PUBLISHED, PUBLISHED, STUDIES

__all__ = ["is_ablation", "plot_ablations", "tables"]

Record = dict[str, Any]

# Colours that people with any colour vision tell apart (Okabe and Ito), and shapes besides.
SERIES: Final = {16: ("#0072b2", "o"), 32: ("#d55e00", "s")}
ACTIVE: Final = 4  # of the points, those with so many active blocks are shown
MEASURES: Final = {"accuracy": ("right answers, %", 100), "tokens_per_step": ("tokens per step", 1)}
APART: Final = 0.36  # of the series of one setting; settings are 1 apart
SPREAD: Final = 0.05  # of the seeds of one series


def is_ablation(path: Path) -> bool:
    """Whether a file holds records of studies."""
    with path.open(encoding="utf-8") as file:
        return '"points"' in file.readline()


def plot_ablations(records: Sequence[Path], output: Path) -> list[Path]:
    """Draw a figure for each study that was run; return their paths.

    Args:
        records: JSON-lines files of `ablate`.
        output: the name of a study goes before its suffix, which chooses the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths = []
    for study, settings, runs in _studies(records):
        width = 1.6 + 1.15 * len(settings)
        figure, panels = pyplot.subplots(1, 2, figsize=(2 * width, 3.6), layout="constrained")
        for axes, measure in zip(panels, MEASURES, strict=True):
            _draw(axes, settings, runs, measure)
            labels = [_label(study, setting).replace(" + ", "\n+ ") for setting in settings]
            axes.set_xticks(range(len(labels)), labels, fontsize=8)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        path = output.with_stem(f"{output.stem}-{study}")
        figure.savefig(path, dpi=144)
        pyplot.close(figure)
        paths.append(path)
    return paths


def tables(records: Sequence[Path]) -> str:
    """Return a Markdown table for each study: means over seeds, lowest and highest in brackets."""
    text = ""
    for study, settings, runs in _studies(records):
        names = [f"{measure}, blocks of {size}" for size in SERIES for measure in ("right", "TPF")]
        text += f"{study}\n\n| setting | seeds | {' | '.join(names)} |\n|{'---|' * 6}\n"
        for setting in settings:
            chosen = [run for run in runs if run["setting"] == setting]
            cells = []
            for size in SERIES:
                right = [100 * value for value in _values(chosen, size, "accuracy")]
                cells.append(_cell(right, " %"))
                cells.append(_cell(_values(chosen, size, "tokens_per_step"), ""))
            text += f"| {_label(study, setting)} | {len(chosen)} | {' | '.join(cells)} |\n"
        text += "\n"
    return text


def _studies(records: Sequence[Path]) -> Iterator[tuple[str, list[str], list[Record]]]:
    """Yield each study of which two settings were run at least, with these and their runs."""
    lines = [line for path in records for line in path.read_text(encoding="utf-8").splitlines()]
    every: list[Record] = [json.loads(line) for line in lines]
    for study, names in STUDIES.items():
        runs = [run for run in every if run["setting"] in names]
        settings = [name for name in names if any(run["setting"] == name for run in runs)]
        if len(settings) > 1:
            yield study, settings, runs


def _draw(axes: Any, settings: Sequence[str], runs: Sequence[Record], measure: str) -> None:
    name, factor = MEASURES[measure]
    for number, (size, (colour, marker)) in enumerate(SERIES.items()):
        middle = APART * (number - (len(SERIES) - 1) / 2)
        for place, setting in enumerate(settings):
            values = _values([r for r in runs if r["setting"] == setting], size, measure)
            values = [factor * value for value in values]
            first = place + middle - SPREAD * (len(values) - 1) / 2
            axes.plot(
                [first + SPREAD * seed for seed in range(len(values))],
                values,
                linestyle="",
                marker=marker,
                markersize=5.5,
                markerfacecolor="none",
                color=colour,
                label=f"blocks of {size}, dots are seeds" if place == 0 else None,
            )
            at = place + middle
            axes.hlines(statistics.mean(values), at - 0.15, at + 0.15, color=colour, linewidth=2)
    axes.set_xlim(-0.5, len(settings) - 0.5)
    axes.set_ylabel(name)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _label(study: str, setting: str) -> str:
    return AS_PUBLISHED[study] if setting == PUBLISHED else setting


def _values(runs: Sequence[Record], block_size: int, measure: str) -> list[float]:
    """Return the measure of each run at this block size, by seed."""
    return [
        point[measure]
        for run in sorted(runs, key=lambda run: int(run["seed"]))
        for point in run["points"]
        if (point["block_size"], point["max_active_blocks"]) == (block_size, ACTIVE)
    ]


def _cell(values: Sequence[float], unit: str) -> str:
    mean = f"{statistics.mean(values):.1f}{unit}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"
