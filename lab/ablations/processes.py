"""Processes that do jobs one after the other, each on its GPU, with their output in files.

A process lives for many jobs, since a device's start and the compilation of a model's layers cost
as much as a short training. A job is a call that can be pickled.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final

__all__ = ["Job", "Places", "Record", "Worker"]

FAREWELL_S: Final = 10.0  # for a process to end by itself

Record = dict[str, Any]
Job = partial[Record] | partial[None]


class Places:
    """Where processes run: `per_gpu` on each GPU, or on the CPU if there are no GPUs."""

    def __init__(self, gpus: Sequence[str], per_gpu: int) -> None:
        devices: list[str | None] = [*gpus] or [None]
        self._places = [(gpu, turn) for turn in range(per_gpu) for gpu in devices]

    @contextmanager
    def open(self, logs: Path) -> Iterator[list["Worker"]]:
        """Start the processes, first of each GPU first; end them on leaving."""
        logs.mkdir(parents=True, exist_ok=True)
        workers: list[Worker] = []
        try:
            for gpu, turn in self._places:
                name = f"{'cpu' if gpu is None else f'gpu{gpu}'}-{turn}"
                workers.append(Worker.start(name, gpu, logs / f"{name}.log"))
            yield workers
        finally:
            for worker in workers:
                worker.process.terminate()
            for worker in workers:
                worker.end()


@dataclass(slots=True)
class Worker:
    """A process and what it is doing."""

    name: str
    process: BaseProcess
    connection: Connection
    job: str = ""  # what it is doing
    began: float = 0.0
    is_warm: bool = False

    @classmethod
    def start(cls, name: str, gpu: str | None, log: Path) -> "Worker":
        """Start a process that sees one GPU, or none."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, log), name=name)
        before = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu or ""  # read when the process starts
        try:
            process.start()
        finally:
            if before is None:
                del os.environ["CUDA_VISIBLE_DEVICES"]
            else:
                os.environ["CUDA_VISIBLE_DEVICES"] = before
        theirs.close()
        return cls(name, process, ours)

    def begin(self, name: str, job: Job) -> None:
        """Send it a job; it must have none."""
        self.job, self.began = name, time.monotonic()
        self.connection.send(job)

    def answer(self) -> tuple[Record | None, str]:
        """Wait for the job's result and the error, "" if all went well."""
        self.job = ""
        try:
            result: tuple[Record | None, str] = self.connection.recv()
        except EOFError:
            self.process.join(FAREWELL_S)
            return None, f"the process ended with code {self.process.exitcode}"
        return result

    def end(self) -> None:
        """Wait until it has ended, which it is helped to if it takes long."""
        self.process.join(FAREWELL_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


def _work(connection: Connection, log: Path) -> None:
    """Do jobs until the pipe closes; the output goes to the log."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the queue ends us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the corpus ends its processes
    with log.open("a", buffering=1, encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        while True:
            try:
                job: Job = connection.recv()
            except EOFError:
                return
            try:
                answer = job(), ""
            except Exception:
                traceback.print_exc()
                answer = None, traceback.format_exc(limit=-1).strip()
            connection.send(answer)
