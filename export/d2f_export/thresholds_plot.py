"""The figure of the thresholds: acceptance rules side by side, and the front over all settings."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

__all__ = ["is_thresholds", "plot_thresholds"]

Point = dict[str, Any]

# Colours that people with any colour vision tell apart (Okabe and Ito), and shapes besides.
SIZES: Final = {
    8: ("#999999", "^"),
    16: ("#0072b2", "o"),
    32: ("#d55e00", "s"),
    48: ("#cc79a7", "v"),
    64: ("#009e73", "D"),
}
RULES: Final = {"token": ("-", "each token"), "joint": ("--", "all together"), "factor": ("", "")}
USUAL: Final = {"max_active_blocks": 4, "add_threshold": 0.1, "activate_threshold": 0.95}


def is_thresholds(path: Path) -> bool:
    """Whether a file holds records of the thresholds command."""
    with path.open(encoding="utf-8") as file:
        return '"acceptance"' in file.readline()


def plot_thresholds(records: Sequence[Path], output: Path) -> None:
    """Draw the rules with four active blocks, and all settings with their front.

    Args:
        records: JSON-lines files of `thresholds`, of one model.
        output: the picture; its suffix chooses the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [line for path in records for line in path.read_text(encoding="utf-8").splitlines()]
    points = [json.loads(line) for line in lines]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(12.6, 5.2), layout="constrained", sharey=True
    )
    _draw_rules(left, [p for p in points if USUAL.items() <= p["setting"].items()])
    _draw_front(right, points)
    left.set_title("a threshold on each token, or on all that is accepted together", fontsize=9)
    right.set_title("all block sizes and thresholds, pipelined or not", fontsize=9)
    left.set_ylabel("right answers, %")
    for axes in (left, right):
        axes.set_xlabel("useful tokens per step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False, loc="lower left")
    figure.savefig(output, dpi=144)
    pyplot.close(figure)


def _draw_rules(axes: Any, points: Sequence[Point]) -> None:
    for size, (colour, marker) in SIZES.items():
        for rule, (style, name) in RULES.items():
            chosen = [p for p in points if _key(p) == (size, rule)]
            if not chosen or (size in (8, 48)):
                continue
            chosen.sort(key=lambda point: float(point["setting"]["confidence_threshold"]))
            x, y = _coordinates(chosen)
            if rule == "factor":
                axes.plot(x, y, "*", color=colour, markersize=12, markeredgecolor="black")
                continue
            fill = colour if rule == "token" else "white"
            label = f"blocks of {size}, {name}"
            axes.plot(x, y, style, marker=marker, markerfacecolor=fill, color=colour, label=label)
            for point, at in list(zip(chosen, zip(x, y, strict=True), strict=True))[
                :: max(1, len(x) - 1)
            ]:
                text = f"{point['setting']['confidence_threshold']:g}"
                axes.annotate(text, at, xytext=(4, 4), textcoords="offset points", fontsize=7)
    if any(p["setting"]["acceptance"] == "factor" for p in points):
        axes.plot([], [], "*", color="white", markersize=12, markeredgecolor="black",
                  label="factor rule of Fast-dLLM")  # fmt: skip


def _draw_front(axes: Any, points: Sequence[Point]) -> None:
    for size, (colour, marker) in SIZES.items():
        for active, fill in ((4, colour), (1, "white")):
            chosen = [
                p
                for p in points
                if (p["setting"]["block_size"], p["setting"]["max_active_blocks"]) == (size, active)
            ]
            if chosen:
                label = f"blocks of {size}, {'four active' if active == 4 else 'no pipeline'}"
                x, y = _coordinates(chosen)
                axes.plot(
                    x, y, linestyle="", marker=marker, markersize=4.5, color=colour,
                    markerfacecolor=fill, label=label,
                )  # fmt: skip
    front = [
        p
        for p in sorted(points, key=lambda p: (p["tokens_per_step"], p["accuracy"]))
        if not any(
            q["tokens_per_step"] > p["tokens_per_step"] and q["accuracy"] >= p["accuracy"]
            for q in points
        )
    ]
    axes.plot(*_coordinates(front), color="black", linewidth=0.8, label="front", zorder=0)


def _key(point: Point) -> tuple[int, str]:
    return point["setting"]["block_size"], point["setting"]["acceptance"]


def _coordinates(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [p["tokens_per_step"] for p in points], [100 * p["accuracy"] for p in points]
