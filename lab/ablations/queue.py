"""The queue of an ablation study: which process does what next, and when there is no time for it.

A process that dies loses its run alone; at the time limit what still runs is ended, and what was
recorded stays.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Final

from lab.ablations.laboratory import Lab
from lab.ablations.processes import Job, Places, Record, Worker
from lab.ablations.settings import Records, Run

__all__ = ["Queue", "Teachers", "run_queue"]

MARGIN: Final = 1.15  # a run is begun if this times the longest so far fits into what is left


@dataclass(frozen=True, slots=True)
class Teachers:
    """Who teaches.

    Attributes:
        given: teaches all; None has teachers made, which is part of the spread between seeds.
        number: how many are made; seed s has teacher s modulo it. None makes one for each seed.
        twin_seconds: bounds the training that a teacher starts from; None leaves the recipe's.
        seconds: bounds its own.
    """

    given: Path | None = None
    number: int | None = None
    twin_seconds: float | None = None
    seconds: float | None = None


class Queue:
    """What is to do: teachers first, then the runs in order, each once its teacher is there."""

    def __init__(self, lab: Lab, runs: Sequence[Run], teachers: Teachers) -> None:
        self._lab = lab
        self._teachers = teachers
        number = teachers.number
        of_seed = {run.seed: run.seed if number is None else run.seed % number for run in runs}
        made = {seed: lab.folder / f"teacher-{index}" for seed, index in of_seed.items()}
        self._runs = [(run, teachers.given or made[run.seed]) for run in runs]
        folders = dict.fromkeys(folder for _, folder in self._runs if not folder.exists())
        seeds = {folder: of_seed[seed] for seed, folder in made.items()}
        self._unmade = [] if teachers.given else [(folder, seeds[folder]) for folder in folders]

    @property
    def runs(self) -> list[Run]:
        """Those that were not begun."""
        return [run for run, _ in self._runs]

    def next(self, left_s: float) -> tuple[str, Job] | None:
        """Take a job and what it is called; None if none can begin with that many seconds left."""
        teachers = self._teachers
        if self._unmade and (teachers.twin_seconds or 0) + (teachers.seconds or 0) < left_s:
            folder, seed = self._unmade.pop(0)
            make = partial(
                self._lab.make_teacher,
                folder,
                seed,
                twin_seconds=teachers.twin_seconds,
                seconds=teachers.seconds,
            )
            return folder.name, make
        for number, (run, folder) in enumerate(self._runs):
            if folder.exists():
                del self._runs[number]
                return f"{run.setting}, seed {run.seed}", partial(self._lab.run, run, folder)
        return None


def run_queue(
    queue: Queue,
    places: Places,
    lab: Lab,
    records: Records,
    *,
    max_seconds: float,
    say: Callable[[str], object],
    on_run: Callable[[], object],
) -> list[str]:
    """Work the queue off, or as much of it as there is time for; return what failed.

    Args:
        queue: what is to do.
        places: where.
        lab: warms idle processes up, if its layers are compiled.
        records: gets a line as soon as a run is done.
        max_seconds: from now; no run is begun that would not end in time.
        say: is told of each job.
        on_run: is called after each run.
    """
    deadline, longest, failed = time.monotonic() + max_seconds, 0.0, list[str]()
    with places.open(lab.folder / "logs") as workers:
        while True:
            left = max(0.0, deadline - time.monotonic())
            for worker in (w for w in workers if not w.job and left > MARGIN * longest):
                _assign(queue, worker, lab, left)
            busy = {worker.connection: worker for worker in workers if worker.job}
            if not busy:
                return failed
            ready = wait(list(busy), None if math.isinf(left) else left)
            if not ready:
                for worker in busy.values():
                    say(f"{worker.name}: {worker.job}: the time was up")
                return failed
            for worker in [worker for key, worker in busy.items() if key in ready]:
                job, seconds = worker.job, time.monotonic() - worker.began
                record, error = worker.answer()
                if error:
                    failed.append(f"{job}: {error}")
                    say(f"{worker.name}: {job}: FAILED: {error}")
                    if not worker.process.is_alive():
                        worker.end()
                        workers.remove(worker)
                    continue
                say(f"{worker.name}: {job}{_summary(record)} in {seconds:.0f} s")
                if record is not None:
                    longest = max(longest, seconds)
                    records.add(record)
                    on_run()


def _assign(queue: Queue, worker: Worker, lab: Lab, left_s: float) -> None:
    taken = queue.next(left_s)
    if taken is not None:
        worker.begin(*taken)
    elif queue.runs and lab.compile_layers and not worker.is_warm:
        worker.begin("warm-up", partial(lab.warm_up, f"warm-up-{worker.name}"))
    worker.is_warm = True


def _summary(record: Record | None) -> str:
    if record is None:
        return ""
    points = [
        f"{100 * point['accuracy']:.1f} % at {point['tokens_per_step']:.1f} tokens a step"
        for point in record["points"]
    ]
    return ": " + ", ".join(points)
