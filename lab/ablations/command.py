"""python -m lab.ablations ablate: its arguments, and what it says while it runs."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lab.ablations.laboratory import Lab
    from lab.ablations.queue import Teachers

__all__ = ["add_arguments", "note_origin", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--study", nargs="+", metavar="NAME", help="default: all, most telling first"
    )
    parser.add_argument(
        "--setting", nargs="+", metavar="NAME", help="these, in this order, instead of studies"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--recipe", choices=["embedded", "tiny"], default="embedded")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="a folder; goes on from there")
    parser.add_argument("--steps", type=int, help="of each student, instead of the recipe's")
    parser.add_argument("--problems", type=int, default=500, help="held-out ones for each student")
    parser.add_argument(
        "--max-seconds", type=float, default=float("inf"), help="begin no run that would end later"
    )
    parser.add_argument("--teacher", type=Path, help="of all students; default: one for each seed")
    parser.add_argument("--teachers", type=int, help="make so many; seed s has teacher s modulo it")
    parser.add_argument("--twin-seconds", type=float, help="what a teacher starts from, at most")
    parser.add_argument("--teacher-seconds", type=float, help="the making of a teacher, at most")
    parser.add_argument("--gpus", nargs="*", metavar="NUMBER", help="default: all; none is the CPU")
    parser.add_argument("--per-gpu", type=int, default=1, help="processes on each")
    parser.add_argument("--workers", type=int, default=0, help="of each, to write problems")
    parser.add_argument("--no-compile", action="store_true", help="do not compile layers on a GPU")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Train and evaluate the students of ablation studies, as many as there is time for."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from lab.ablations.processes import Places
    from lab.ablations.queue import Queue, run_queue
    from lab.ablations.settings import STUDIES, Records, checked_settings, runs_of, settings_of
    from lab.embedded_model.recipe import RECIPES

    every = runs_of(
        checked_settings(arguments.setting)
        if arguments.setting
        else settings_of(arguments.study or STUDIES),
        arguments.seeds,
        steps=arguments.steps or RECIPES[arguments.recipe].study.steps,
        problems=arguments.problems,
        recipe=arguments.recipe,
    )
    for path in filter(None, (arguments.tokenizer, arguments.teacher)):
        if not path.exists():
            raise SystemExit(f"there is no {path}")
    gpus = _gpus() if arguments.gpus is None else arguments.gpus
    lab = _lab(arguments, on_gpu=bool(gpus))
    records = Records(arguments.output / "records.jsonl")
    left = [run for run in every if run not in records]
    if left:
        note_origin(arguments.output / "records.runs.jsonl")
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.completed} of {task.total} runs"),
        BarColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(every), completed=len(every) - len(left))
        failed = run_queue(
            Queue(lab, left, _teachers(arguments)),
            Places(gpus, arguments.per_gpu),
            lab,
            records,
            max_seconds=arguments.max_seconds,
            say=partial(console.print, highlight=False, markup=False, soft_wrap=True),
            on_run=partial(bar.advance, task),
        )
    missing = sum(run not in records for run in every)
    console.print(f"{len(every) - missing} of {len(every)} runs are in {records.path}")
    if failed:
        raise SystemExit(f"{len(failed)} failed; see {arguments.output / 'logs'}")
    if missing:
        console.print("start the command again for the rest")


def _lab(arguments: argparse.Namespace, *, on_gpu: bool) -> "Lab":
    from lab.ablations.laboratory import Lab

    return Lab(
        folder=arguments.output,
        tokenizer=arguments.tokenizer,
        recipe=arguments.recipe,
        device="cuda" if on_gpu else "cpu",
        num_workers=arguments.workers,
        compile_layers=on_gpu and not arguments.no_compile,
    )


def _teachers(arguments: argparse.Namespace) -> "Teachers":
    from lab.ablations.queue import Teachers

    return Teachers(
        given=arguments.teacher,
        number=arguments.teachers,
        twin_seconds=arguments.twin_seconds,
        seconds=arguments.teacher_seconds,
    )


def _gpus() -> list[str]:
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def note_origin(path: Path) -> None:
    """Append to a file of JSON lines where the next records come from."""
    from d2f_runtime.provenance import environment
    from lab.records import command_of

    origin = environment(command_of("lab.ablations", sys.argv[1:]))
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(origin) + "\n")
