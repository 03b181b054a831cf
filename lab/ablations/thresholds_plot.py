"""The figure of the thresholds: acceptance rules side by side, a panel for each block size."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

__all__ = ["is_thresholds", "plot_thresholds"]

Point = dict[str, Any]

# Colours that people with any colour vision tell apart (Okabe and Ito), and shapes besides.
RULES: Final = {
    "token": ("-", "o", "#0072b2", "threshold on each token"),
    "joint": ("--", "s", "#d55e00", "threshold on all that is accepted together"),
    "factor": ("", "*", "black", "factor rule of Fast-dLLM"),
}
USUAL: Final = {"max_active_blocks": 4, "add_threshold": 0.1, "activate_threshold": 0.95}
NAMED: Final = (0.9, 0.99)  # the thresholds that are written beside their markers
HEIGHTS: Final = {"token": -14, "joint": 6}  # points, of these from the markers


def is_thresholds(path: Path) -> bool:
    """Whether a file holds records of the thresholds command."""
    with path.open(encoding="utf-8") as file:
        return '"acceptance"' in file.readline()


def plot_thresholds(records: Sequence[Path], output: Path) -> None:
    """Draw each rule over its thresholds, for the block sizes that two rules were run with.

    Args:
        records: JSON-lines files of `thresholds`, of one model. Settings that differ from the
            defaults in more than block size, rule and confidence are left out.
        output: the picture; its suffix chooses the format.

    Raises:
        SystemExit: no block size has two rules.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [line for path in records for line in path.read_text(encoding="utf-8").splitlines()]
    points = [p for p in map(json.loads, lines) if USUAL.items() <= p["setting"].items()]
    sizes = sorted({p["setting"]["block_size"] for p in points})
    sizes = [
        size for size in sizes if len({rule for s, rule in map(_key, points) if s == size}) > 1
    ]
    if not sizes:
        raise SystemExit("no block size was run with two rules; run more settings")
    figure, panels = pyplot.subplots(
        1,
        len(sizes),
        figsize=(1.2 + 3.8 * len(sizes), 5.2),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for size, axes in zip(sizes, panels[0], strict=True):
        _draw(axes, points, size)
        axes.set_title(f"blocks of {size}", fontsize=10)
        axes.set_xlabel("useful tokens per step")
        axes.margins(x=0.14, y=0.07)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("right answers, %")
    handles = panels[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(RULES), frameon=False)
    figure.savefig(output, dpi=144)
    pyplot.close(figure)


def _draw(axes: Any, points: Sequence[Point], size: int) -> None:
    for rule, (style, marker, colour, label) in RULES.items():
        chosen = [p for p in points if _key(p) == (size, rule)]
        chosen.sort(key=lambda point: float(point["setting"]["confidence_threshold"]))
        x = [p["tokens_per_step"] for p in chosen]
        y = [100 * p["accuracy"] for p in chosen]
        axes.plot(
            x, y, linestyle=style, marker=marker, markersize=11 if rule == "factor" else 5,
            markerfacecolor="white" if rule == "joint" else colour, color=colour, label=label,
        )  # fmt: skip
        for point, *at in zip(chosen, x, y, strict=True):
            if rule in HEIGHTS and point["setting"]["confidence_threshold"] in NAMED:
                axes.annotate(
                    f"{point['setting']['confidence_threshold']:g}", at, color=colour, fontsize=7,
                    xytext=(0, HEIGHTS[rule]), textcoords="offset points",
                    ha="center",
                )  # fmt: skip


def _key(point: Point) -> tuple[int, str]:
    return point["setting"]["block_size"], point["setting"]["acceptance"]
