"""What a training shows of itself: rows of a CSV file and a progress bar."""

import csv
from pathlib import Path
from typing import Self

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

__all__ = ["TrainingLog"]


class TrainingLog:
    """log.csv and a progress bar (a line now and then where there is no terminal)."""

    def __init__(self, folder: Path, *, every: int) -> None:
        self._path = folder / "log.csv"
        self._every = every
        self._bar = Progress(
            TextColumn(folder.name),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        self._task = self._bar.add_task("starting", total=1.0)

    def __enter__(self) -> Self:
        fresh = not self._path.exists()
        self._file = self._path.open("a", newline="")
        self._csv = csv.writer(self._file)
        if fresh:
            self._csv.writerow(["step", "seconds", "tokens", "loss", "lr"])
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()
        self._file.close()

    def row(
        self,
        loss: Tensor,
        rate: float,
        progress: float,
        *,
        step: int,
        seconds: float,
        tokens: int,
    ) -> None:
        """Log every so many steps; reading the loss waits for the device."""
        if step % self._every:
            return
        value = loss.item()
        self._csv.writerow([step, f"{seconds:.1f}", tokens, f"{value:.5f}", f"{rate:.3g}"])
        self._file.flush()
        speed = tokens / max(seconds, 1e-9) / 1e6
        text = f"step {step} loss {value:.4f} {speed:.2f} Mtok/s"
        self._bar.update(self._task, completed=progress, description=text)
        if not self._bar.console.is_terminal and step % (20 * self._every) == 0:
            self._bar.console.print(f"{text} {seconds:.0f} s")
