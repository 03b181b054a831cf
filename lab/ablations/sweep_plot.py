"""The trade-off figure of a sweep: score against tokens per step, and against tokens/s if measured.

The figure of the D2F paper (arXiv 2508.09192, figure 2) with every system on the same axes. Lines
run over the confidence threshold; the other thresholds stand beside them as crosses.
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

__all__ = ["plot_sweep"]

Row = dict[str, str]

COLOURS: Final = {8: "#9467bd", 16: "#1f77b4", 32: "#d9720b", 48: "#8c564b", 64: "#2a8f3c"}
OTHER: Final = "#555555"
STYLES: Final[dict[str, dict[str, Any]]] = {
    "d2f": {"marker": "o", "linestyle": "-"},
    "no-pipeline": {"marker": "s", "linestyle": "--", "markerfacecolor": "white"},
    "lookahead": {"marker": "*", "linestyle": "", "markersize": 11},
    "fixed-count": {"marker": "P", "linestyle": "", "color": OTHER},
    "vanilla": {"marker": "D", "linestyle": "", "color": OTHER},
    "ar": {"marker": "^", "linestyle": "", "color": "black"},
}
MEASURES: Final = {"tokens_per_step": "useful tokens per step", "tokens_per_s": "useful tokens/s"}


def plot_sweep(tables: Sequence[Path], output: Path) -> None:
    """Draw one panel for each measure that the tables hold.

    Args:
        tables: CSV files of `lab.bench sweep`.
        output: the picture; its suffix chooses the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for path in tables for row in _read(path)]
    measures = [name for name in MEASURES if any(row[name] for row in rows)]
    width = 7.6 * len(measures)
    figure, panels = pyplot.subplots(
        1, len(measures), figsize=(width, 5.6), layout="constrained", squeeze=False
    )
    for axes, measure in zip(panels[0], measures, strict=True):
        _draw(axes, [row for row in rows if row[measure]], measure)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(output, dpi=144)
    pyplot.close(figure)


def _read(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _draw(axes: Any, rows: Sequence[Row], measure: str) -> None:
    for series, points in _series(rows).items():
        _draw_series(axes, series, points, measure)
    axes.set_xlabel(MEASURES[measure])
    axes.set_ylabel("right answers, %")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _series(rows: Sequence[Row]) -> dict[tuple[str, str, int], list[Row]]:
    series: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        key = (row["system"], row["model"], int(row["block_size"]))
        series.setdefault(key, []).append(row)
    order = list(STYLES)
    return dict(sorted(series.items(), key=lambda item: (order.index(item[0][0]), item[0][2])))


def _draw_series(
    axes: Any, series: tuple[str, str, int], points: Sequence[Row], measure: str
) -> None:
    system, _, block_size = series
    style = {"color": COLOURS.get(block_size, OTHER), "markersize": 5.5, **STYLES[system]}
    line = [p for p in points if _is_on_line(p)]
    line.sort(key=lambda p: float(p["confidence_threshold"]))
    x, y = [float(p[measure]) for p in line], [100 * float(p["score"]) for p in line]
    errors = [100 * _error(p) for p in line]
    axes.errorbar(
        x, y, yerr=errors, label=_label(series, points), linewidth=1.3, elinewidth=0.6, **style
    )
    if system == "d2f":
        ends = (line[0], line[-1]) if len(x) > 1 and max(x) > 1.05 * min(x) else ()
        for p, at in zip(line, zip(x, y, strict=True), strict=True):
            if p in ends:
                text = f"{float(p['confidence_threshold']):g}"
                axes.annotate(
                    text, at, xytext=(5, 5), textcoords="offset points", fontsize=7.5,
                    color=style["color"],
                )  # fmt: skip
        others = [p for p in points if not _is_on_line(p)]
        axes.plot(
            [float(p[measure]) for p in others],
            [100 * float(p["score"]) for p in others],
            marker="x",
            linestyle="",
            markersize=5,
            color=style["color"],
        )


def _is_on_line(row: Row) -> bool:
    return (float(row["add_threshold"]), float(row["activate_threshold"])) == (0.1, 0.95)


def _error(row: Row) -> float:
    """Return the standard error of the score of this many problems."""
    share = float(row["score"])
    return math.sqrt(share * (1 - share) / int(row["num_problems"]))


def _label(series: tuple[str, str, int], points: Sequence[Row]) -> str:
    system, model, block_size = series
    match system:
        case "d2f":
            return f"D2F, blocks of {block_size}, {points[0]['max_active_blocks']} active"
        case "no-pipeline":
            return f"D2F, blocks of {block_size}, no pipeline"
        case "lookahead":
            return f"D2F, blocks of {block_size}, {points[0]['lookahead']} lookahead branches"
        case "fixed-count":
            return f"cached blocks of {block_size}, {_tokens(points[0])} a step"
        case "vanilla":
            return f"vanilla: full attention, {_tokens(points[0])} a step"
        case _:
            return f"autoregressive ({model})"


def _tokens(row: Row) -> str:
    number = int(row["num_per_step"])
    return "1 token" if number == 1 else f"{number} tokens"
