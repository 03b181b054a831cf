"""The trade-off figure: accuracy against useful tokens per step, from evaluation records."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot_trade_off"]


def plot_trade_off(records: Sequence[Path], output: Path) -> None:
    """Draw one line per model and block setting over its confidence thresholds.

    Args:
        records: JSON-lines files of `evaluate --output`.
        output: the picture; its suffix chooses the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.6), layout="constrained")
    axes.set_prop_cycle(color=matplotlib.colormaps["tab20"](range(20)))
    for label, points in _series(records).items():
        points.sort(key=lambda point: point["tokens_per_step"])
        x = [point["tokens_per_step"] for point in points]
        y = [100 * point["accuracy"] for point in points]
        axes.plot(x, y, marker="o", markersize=4, linewidth=1.2, label=label)
        if len(points) > 2:
            for point in (points[0], points[-1]):
                text = f"{point['setting']['confidence_threshold']:g}"
                at = (point["tokens_per_step"], 100 * point["accuracy"])
                axes.annotate(text, at, xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel("useful tokens per step")
    axes.set_ylabel("right answers, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(output, dpi=144)
    pyplot.close(figure)


def _series(records: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    series: dict[str, list[dict[str, Any]]] = {}
    for path in records:
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            series.setdefault(_label(entry["model"], entry["setting"]), []).append(entry)
    return series


def _label(model: str, setting: dict[str, Any]) -> str:
    if setting.get("vanilla") or setting.get("attention") == "full":  # the first: older records
        return f"{model}, vanilla, one token a step"
    block_size = setting.get("block_size", 32)
    if block_size == 1:
        return model
    active = setting.get("max_active_blocks", 4)
    pipeline = "no pipeline" if active == 1 else f"{active} active blocks"
    return f"{model}, blocks of {block_size}, {pipeline}"
