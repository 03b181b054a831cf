"""What a training shows of itself: CSV files, a progress bar, a figure of the loss.

A resumed run takes back the rows that a killed one wrote after its last checkpoint.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from d2f_export.distill.memory import MemoryPlan, as_text
from d2f_export.distill.validation import Score
from d2f_export.distill.whole_files import replacing

__all__ = ["TrainingLog", "plot_loss", "show_plan"]

LOSSES: Final = ("step", "seconds", "tokens", "loss", "lr")
SCORES: Final = ("step", "accuracy", "tokens_per_step", "mean_tokens", "answers")


class TrainingLog:
    """log.csv, validation.csv and a progress bar (lines where there is no terminal).

    Args:
        folder: of the run.
        columns: of log.csv, behind those of every training.
        step: that the run goes on from; later rows are taken back.
        console: None writes the files in silence.
    """

    def __init__(
        self, folder: Path, columns: tuple[str, ...], *, step: int, console: Console | None
    ) -> None:
        self._losses, self._scores = folder / "log.csv", folder / "validation.csv"
        _begin(self._losses, LOSSES + columns, step)
        self._has_scores = self._scores.exists()
        if self._has_scores:
            _begin(self._scores, SCORES, step)
        self._console = console
        self._bar = Progress(
            TextColumn(folder.name),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            disable=console is None or not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=1.0)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def losses(
        self,
        step: int,
        loss: float,
        rate: float,
        *,
        progress: float,
        seconds: float,
        tokens: int,
        speed: float,
        figures: Sequence[object],
    ) -> None:
        """Add a row to log.csv.

        Args:
            step: steps taken.
            loss: mean since the last row.
            rate: learning rate.
            progress: share of the training that is done.
            seconds: spent in training.
            tokens: trained on so far.
            speed: tokens/s since the last row.
            figures: in the training's own columns.
        """
        row = [step, f"{seconds:.1f}", tokens, f"{loss:.6g}", f"{rate:.3g}", *figures]
        _append(self._losses, row)
        text = f"step {step} loss {loss:.4f} {speed:,.0f} tokens/s"
        self._bar.update(self._task, completed=progress, description=text)
        if self._console is not None and not self._console.is_terminal:
            self._console.print(f"{text} ({progress:.0%})", highlight=False)

    def score(self, step: int, score: Score) -> None:
        """Add a row to validation.csv."""
        if not self._has_scores:
            _begin(self._scores, SCORES, step)
            self._has_scores = True
        mean = score.num_tokens / max(1, score.num_answers)
        figures = [f"{score.accuracy:.4f}", f"{score.tokens_per_step:.3f}", f"{mean:.1f}"]
        _append(self._scores, [step, *figures, score.num_answers])
        if self._console is not None:
            self._bar.console.print(
                f"step {step}: {score.num_right} of {score.num_answers} right, "
                f"{score.tokens_per_step:.2f} tokens per step",
                highlight=False,
            )


def show_plan(console: Console, plan: MemoryPlan, available: int) -> None:
    """Print the memory plan."""
    table = Table("memory", "")
    for name, size in plan.lines():
        table.add_row(name, size)
    table.add_row("on the device", as_text(available))
    console.print(table)


def plot_loss(folder: Path) -> None:
    """Draw loss.png: the loss over the steps, and below it what validation found."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(folder / "log.csv", "loss")]
    if (folder / "validation.csv").exists():
        scores = folder / "validation.csv"
        panels += [(scores, "accuracy"), (scores, "tokens_per_step")]
    figure, grid = pyplot.subplots(
        len(panels), figsize=(7.2, 2 + 2.2 * len(panels)), layout="constrained", sharex=True,
        squeeze=False,
    )  # fmt: skip
    for (path, column), axes in zip(panels, grid[:, 0], strict=True):
        rows = _read(path)
        steps = [float(row["step"]) for row in rows]
        marker = "" if column == "loss" else "o"
        axes.plot(steps, [float(row[column]) for row in rows], linewidth=1, marker=marker)
        axes.set_ylabel(column.replace("_", " "))
        axes.grid(alpha=0.3)
    axes.set_xlabel("optimiser steps")
    figure.savefig(folder / "loss.png", dpi=144)
    pyplot.close(figure)


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _begin(path: Path, columns: tuple[str, ...], step: int) -> None:
    """Leave the header and the rows up to `step`."""
    rows = _read(path) if path.exists() else []
    whole = [row for row in rows if None not in row.values()]  # a kill may cut the last one
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(row for row in whole if float(row["step"]) <= step)


def _append(path: Path, row: list[object]) -> None:
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(row)
