"""The one training loop: optimiser steps and what is between them, whatever is trained.

Log, validation, checkpoints, the end. The training is given.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor

from d2f_export.distill.log import TrainingLog, plot_loss
from d2f_export.distill.run_folder import RunFolder, RunState, Stored
from d2f_export.distill.validation import Score
from d2f_stream.core.errors import D2FError

__all__ = ["Training", "is_finished", "train"]


class Training(Stored, Protocol):
    """What the loop takes from step to step; all processes call the same methods in turn.

    Attributes:
        columns: of log.csv, behind those that every training has.
        sizes: the settings that its memory depends on, for people.
        validate: returns a score over all processes; None does without.
        validate_every: steps from one validation to the next.
        rate: learning rate of the last step.
    """

    columns: tuple[str, ...]
    sizes: str
    validate: Callable[[], Score] | None
    validate_every: int
    rate: float

    def begin(self, state: RunState) -> None:
        """Go on from where a run stands, and count tokens and data there from now on."""

    def step(self, progress: float) -> Tensor:
        """Take the run's next step and return its mean loss on this process.

        Args:
            progress: share of the training that is done.
        """
        ...

    def figures(self) -> Sequence[object]:
        """Return what stands in the columns; may wait for the device."""
        ...

    def write(self, folder: Path) -> None:
        """Write what was trained, as it is loaded for use; the first process does."""

    def summary(self) -> str:
        """Return what became of the data, for the last line of the run."""
        ...

    def close(self) -> None:
        """Give batches back, and the processes that prepare them."""


def train(
    folder: RunFolder,
    open_training: Callable[[], Training],
    *,
    accelerator: Any,
    num_examples: int = 0,
    console: Console | None = None,
) -> Path:
    """Train, or go on where the folder holds a part of the run. Blocks.

    Args:
        folder: the run's; at the end also the model's.
        open_training: loads what is trained, once the folder is known to be this run's.
        accelerator: from open_accelerator.
        num_examples: in the data, which must stay the same; 0 where it may become more.
        console: where progress and counts are shown; None is silent.

    Returns:
        The model's folder.

    Raises:
        InvalidRequest: the folder or the data are those of another run.
        ModelDamaged: the run's checkpoint cannot be read.
        D2FError: something cannot be written, or the memory does not do after all.
    """
    if is_finished(folder, console):
        return folder.path
    if accelerator.is_main_process:
        folder.claim()
    accelerator.wait_for_everyone()
    training = open_training()
    state = folder.restore(training, num_examples)
    if console is not None:
        action = f"goes on from step {state.step}" if state.step else "begins"
        data = f"{num_examples} examples, " if num_examples else ""
        console.print(f"{folder.path}: {data}{action}", highlight=False)
    training.begin(state)
    loop = _Loop(training, folder, state, accelerator, console)
    try:
        loop.run()
    except torch.OutOfMemoryError as error:
        raise D2FError(
            f"the device ran out of memory after step {state.step}; lower {training.sizes}, or "
            "give it to nobody else, and start the command again"
        ) from error
    loop.finish()
    accelerator.end_training()
    return folder.path


def is_finished(folder: RunFolder, console: Console | None) -> bool:
    """Whether nothing is left to do; a finished training is not begun anew."""
    end = folder.finished()
    if end is not None and console is not None:
        console.print(
            f"{folder.path}: finished after {end.step} steps, the model is there; to go on, raise "
            "what ended it (steps, max_seconds or patience)",
            highlight=False,
        )
    return end is not None


class _Loop:
    """Takes a run from where it stands to its end.

    Args:
        training: takes the steps.
        folder: the run's.
        state: where it stands; kept up to date.
        accelerator: of the training.
        console: None is silent, as on all processes but the first.
    """

    def __init__(
        self,
        training: Training,
        folder: RunFolder,
        state: RunState,
        accelerator: Any,
        console: Console | None,
    ) -> None:
        self._training = training
        self._settings = folder.settings
        self._accelerator = accelerator
        self._folder = folder
        self._state = state
        self._since = msgspec.structs.replace(state) if folder.settings.is_per_start else RunState()
        self._console = console
        self._losses: list[Tensor] = []
        self._clock = torch.tensor(state.seconds)

    def run(self) -> None:
        """Train to the last step, to the end of the time, or until validation gains no more."""
        settings, state, training = self._settings, self._state, self._training
        validate, every = training.validate, training.validate_every
        started = time.monotonic() - state.seconds
        logged = (state.seconds, state.tokens)
        with closing(training), self._opened_log() as log:
            while (progress := self._progress()) < 1.0 and not self._is_over():
                self._losses.append(training.step(progress))
                state.step += 1
                state.seconds = self._agreed(time.monotonic() - started)
                last = self._progress() >= 1.0
                if last or state.step % settings.log_every == 0:
                    self._log(log, logged)
                    logged = (state.seconds, state.tokens)
                if validate is not None and (last or state.step % every == 0):
                    self._judge(validate(), log)
                if last or self._is_over() or state.step % settings.save_every == 0:
                    self._folder.save(self._accelerator, training, state)

    def finish(self) -> None:
        """Write the model and the figure and say what became of the data."""
        path = self._folder.path
        self._write(path)
        if self._accelerator.is_main_process:
            plot_loss(path)
            self._folder.finish(self._state)
        if self._console is not None:
            self._console.print(
                f"{self._state.step} steps; {self._training.summary()}; the model is in {path}",
                highlight=False,
            )
        self._accelerator.wait_for_everyone()

    def _opened_log(self) -> AbstractContextManager[TrainingLog | None]:
        if not self._accelerator.is_main_process:
            return nullcontext()
        return TrainingLog(
            self._folder.path, self._training.columns, step=self._state.step, console=self._console
        )

    def _progress(self) -> float:
        return self._state.progress(self._settings, self._since)

    def _is_over(self) -> bool:
        return self._state.is_over(self._folder.patience)

    def _agreed(self, seconds: float) -> float:
        """Return the first process's clock where the end depends on it: all must end together.

        It is the clock of a step ago, so that nobody waits for the device.
        """
        if self._settings.max_seconds is None or self._accelerator.num_processes == 1:
            return seconds
        from accelerate.utils import broadcast

        before = self._clock
        self._clock = broadcast(torch.full((), seconds, device=self._accelerator.device))
        return float(before)

    def _log(self, log: TrainingLog | None, logged: tuple[float, int]) -> None:
        loss = self._accelerator.reduce(torch.stack(self._losses).mean(), "mean").item()
        self._losses.clear()
        figures = self._training.figures()
        if log is None:
            return
        state = self._state
        log.losses(
            state.step,
            loss,
            self._training.rate,
            progress=self._progress(),
            seconds=state.seconds,
            tokens=state.tokens,
            speed=(state.tokens - logged[1]) / max(1e-9, state.seconds - logged[0]),
            figures=figures,
        )

    def _judge(self, score: Score, log: TrainingLog | None) -> None:
        state = self._state
        if log is not None:
            log.score(state.step, score)
        if state.best is not None and score.rank <= state.best:
            state.since_best += 1
            return
        state.best, state.since_best = score.rank, 0
        self._write(self._folder.path / "best")

    def _write(self, folder: Path) -> None:
        try:
            self._training.write(folder)
        except (OSError, SafetensorError) as error:
            raise D2FError(
                f"the model could not be written into {folder}: {error}; free some space and "
                "start the same command again, it goes on from the last checkpoint"
            ) from error
