"""The figure of the open-text comparison: perplexity and repetition against tokens per step."""

from pathlib import Path
from typing import Any, Final

from d2f_export.open_text.scores import Record, read_records

__all__ = ["plot_open_text"]

PANELS: Final = {
    "perplexity": "perplexity under the autoregressive twin",
    "repeated_4grams": "repeated 4-grams, % of a text",
}
LINES: Final[dict[str, dict[str, Any]]] = {
    "D2F, blocks of 16": {"color": "#1f77b4", "marker": "o"},
    "D2F, blocks of 32": {"color": "#d9720b", "marker": "o"},
    "D2F, blocks of 16, no pipeline": {"color": "#1f77b4", "marker": "s", "linestyle": "--"},
    "D2F, blocks of 16, temperature 0.7": {"color": "#8c564b", "marker": "v"},
    "D2F, blocks of 16, temperature 1": {"color": "#9467bd", "marker": "^"},
}
ENDS: Final = {  # where a line's first and last threshold are written, in points; not crossing
    "D2F, blocks of 16": (2, -12),
    "D2F, blocks of 32": (2, 6),
    "D2F, blocks of 16, temperature 0.7": (-6, 7),
    "D2F, blocks of 16, temperature 1": (4, 5),
}
POINTS: Final = {
    "one-token": ("P", "student, 1 token a step"),
    "vanilla": ("D", "teacher, vanilla"),
}
TEMPERATURES: Final = {0.0: "#2a8f3c", 0.7: "#8c564b", 1.0: "#9467bd"}  # of levels and points


def plot_open_text(records: Path, output: Path) -> None:
    """Draw lines over the confidence threshold; the text's own continuation and AR are levels.

    Args:
        records: JSON lines of the evaluation.
        output: the picture; its suffix chooses the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_records(records)
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
    for axes, (measure, title) in zip(panels, PANELS.items(), strict=True):
        _draw(axes, rows, measure)
        axes.set_xlabel("tokens per step (at the ends of lines: confidence above)")
        axes.set_ylabel(title)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].yaxis.set_minor_formatter("{x:g}")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(output, dpi=144)
    pyplot.close(figure)


def _draw(axes: Any, rows: list[Record], measure: str) -> None:
    scale = 100.0 if measure == "repeated_4grams" else 1.0
    for row in rows:
        colour = TEMPERATURES[row["setting"].get("temperature", 0.0)]
        look: dict[str, Any] = {"color": colour, "label": _label(row)}
        if row["system"] == "human":
            axes.axhline(scale * row[measure], **look | {"color": "#444444"}, linewidth=1.2)
        elif row["system"] == "ar":
            axes.axhline(scale * row[measure], **look, linewidth=1.2, linestyle="--")
        elif row["system"] in POINTS:
            marker, _ = POINTS[row["system"]]
            axes.plot(
                row["tokens_per_step"], scale * row[measure], marker=marker, linestyle="", **look
            )
    for label, style in LINES.items():
        line = [row for row in rows if _label(row) == label]
        line.sort(key=lambda row: float(row["setting"]["confidence_threshold"]))
        if line:
            _draw_line(axes, line, measure, scale, {"label": label, **style})


def _draw_line(
    axes: Any, line: list[Record], measure: str, scale: float, style: dict[str, Any]
) -> None:
    x = [row["tokens_per_step"] for row in line]
    y = [scale * row[measure] for row in line]
    axes.plot(x, y, markersize=4.5, linewidth=1.3, **style)
    if style["label"] not in ENDS:
        return
    for index in {0, len(line) - 1}:
        axes.annotate(
            f"{line[index]['setting']['confidence_threshold']:g}", (x[index], y[index]),
            xytext=ENDS[style["label"]], textcoords="offset points", fontsize=7.5,
            color=style["color"],
        )  # fmt: skip


def _label(row: Record) -> str:
    setting = row["setting"]
    temperature = setting.get("temperature", 0.0)
    ending = f", temperature {temperature:g}" if temperature else ""
    match row["system"]:
        case "human":
            return "the text's own continuation"
        case "ar":
            return f"autoregressive twin{ending or ', greedy'}"
        case "d2f":
            return f"D2F, blocks of {setting['block_size']}{ending}"
        case "no-pipeline":
            return f"D2F, blocks of {setting['block_size']}, no pipeline"
        case "one-token" | "vanilla" as name:
            return POINTS[name][1] + ending
        case other:
            return str(other)
