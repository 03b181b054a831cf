"""Score against speed over a grid of settings: the trade-off figure of the D2F paper.

Each row of the CSV is one system under one setting on one task. A row is written as soon as it is
known, and rows that the file has already are not run again, so a sweep that was stopped goes on.
Windows are not narrowed as sessions grow: scores and tokens per step depend on neither the machine
nor on how many answers run side by side.
"""

import csv
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from d2f_runtime.provenance import environment
from d2f_stream.core.errors import InvalidParams
from d2f_stream.core.session import Engine
from lab.bench.sweep_grid import Setting
from lab.bench.sweep_tasks import SweepTask
from lab.records import command_of, replace_text, whole_lines

__all__ = ["COLUMNS", "Table", "sweep"]

FIELDS: Final = (
    "block_size",
    "max_active_blocks",
    "add_threshold",
    "activate_threshold",
    "confidence_threshold",
    "num_per_step",
    "attention",
    "stop_at_eos",
    "max_new_tokens",
)
KEY: Final = ("model", "task", "system", *FIELDS, "num_problems")
COLUMNS: Final = (
    *KEY, "score", "tokens_per_step", "mean_tokens", "mean_steps", "tokens_per_s",
)  # fmt: skip


class Table:
    """The CSV file of a sweep. A last line that was not written whole is dropped.

    Raises:
        InvalidParams: the file has other columns.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = whole_lines(path).splitlines()
        if lines and tuple(lines[0].split(",")) != COLUMNS:
            raise InvalidParams("output", str(path), "a new file, or one that a sweep has written")
        self._keys = {self._key(row) for row in csv.DictReader(lines)}
        if not lines:
            replace_text(path, ",".join(COLUMNS) + "\n")

    def __contains__(self, row: dict[str, Any]) -> bool:
        return self._key(row) in self._keys

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, in one write."""
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
        self._keys.add(self._key(row))

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple("" if row[name] is None else str(row[name]) for name in KEY)


async def sweep(
    engine: Engine,
    task: SweepTask,
    output: Path,
    settings: Sequence[Setting],
    *,
    label: str | None = None,
    command: Sequence[str] = (),
    say: Callable[[str], object] = lambda _: None,
    on_progress: Callable[[str, int, int], object] = lambda *_: None,
) -> int:
    """Run every setting that the file lacks; return how many ran.

    Safe to cancel; the rows that are written stay.

    Args:
        engine: open, see `d2f_runtime.evaluation.samples.opened`.
        task: what to answer.
        output: the CSV file.
        settings: see `settings_of`.
        label: instead of the model's name.
        command: the arguments of this run. With the first new row they go, with commit, machine
            and versions, into the file beside the table that ends in .runs.jsonl.
        say: is told of each row.
        on_progress: is told what runs, how many answers are there and how many there will be.
    """
    table = Table(output)
    num_run = 0
    for count, setting in enumerate(settings, 1):
        params = engine.defaults.with_overrides(setting.overrides)
        row: dict[str, Any] = {name: getattr(params, name) for name in FIELDS}
        row |= {"model": label or engine.info.name, "system": setting.system, **task.columns}
        name = f"{count}/{len(settings)} {setting.system} {json.dumps(setting.overrides)}"
        if row in table:
            say(f"{name}: already there")
            continue
        began = time.perf_counter()
        figures = await task.measure(engine, setting.overrides, _progress(on_progress, name))
        if not num_run:
            _note_origin(output.with_suffix(".runs.jsonl"), command)
        table.add({**row, **figures})
        num_run += 1
        say(f"{name}: {json.dumps(figures)} in {time.perf_counter() - began:.0f} s")
    return num_run


def _note_origin(path: Path, command: Sequence[str]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(environment(command_of("lab.bench", command))) + "\n")


def _progress(
    on_progress: Callable[[str, int, int], object], name: str
) -> Callable[[int, int], object]:
    return lambda done, total: on_progress(name, done, total)
