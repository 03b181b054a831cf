"""Loop: optimiser steps with what happens between them: log, validation, checkpoints, the end."""

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from d2f_export.distill.base import Base
from d2f_export.distill.feed import Feed
from d2f_export.distill.log import DistillLog, plot_loss
from d2f_export.distill.run_folder import RunFolder, RunState
from d2f_export.distill.settings import DistillSettings
from d2f_export.distill.student import trainable
from d2f_export.distill.trainer import Trainer, is_sharded
from d2f_export.distill.validation import Score, Validation

__all__ = ["Loop"]


class Loop:
    """Takes a run from where it stands to its end.

    Args:
        settings: of the run.
        base: of the student.
        trainer: takes the steps.
        feed: gives the batches.
        folder: the run's.
        state: where it stands; kept up to date.
        validation: None does without.
        console: None is silent, as on all processes but the first.
    """

    def __init__(
        self,
        settings: DistillSettings,
        base: Base,
        trainer: Trainer,
        feed: Feed,
        folder: RunFolder,
        state: RunState,
        validation: Validation | None,
        console: Console | None,
    ) -> None:
        self._settings = settings
        self._base = base
        self._trainer = trainer
        self._accelerator = trainer.accelerator
        self._feed = feed
        self._folder = folder
        self._state = state
        self._validation = validation
        self._console = console
        self._losses: list[Tensor] = []

    def run(self) -> None:
        """Train to the last step, or until validation says that it gains no more."""
        settings, state = self._settings, self._state
        batches = self._feed.batches()
        started, logged = time.monotonic() - state.seconds, (time.monotonic(), state.step)
        with self._opened_log() as log:
            while state.step < settings.steps and not self._is_over():
                self._losses.append(self._trainer.step(state.step, batches))
                state.step += 1
                last = state.step == settings.steps
                if last or state.step % settings.log_every == 0:
                    logged = self._log(log, started, logged)
                if self._validation is not None and (
                    last or state.step % settings.validate_every == 0
                ):
                    self._validate(log)
                if last or self._is_over() or state.step % settings.save_every == 0:
                    self._save(started)

    def finish(self) -> Path:
        """Write the student and the figure and say what became of the data."""
        weights = self._weights()
        path = self._folder.path
        if self._accelerator.is_main_process:
            path = self._folder.write_student(weights, self._base, self._settings)
            plot_loss(path)
            if self._console is not None:
                counts, state = self._feed.counts, self._state
                self._console.print(
                    f"{state.step} steps; of {self._feed.position} examples drawn {counts.used} "
                    f"were used ({counts.cut} cut) and {counts.dropped} dropped as too long for "
                    f"length {self._settings.length}; the student is in {path}",
                    highlight=False,
                )
        self._accelerator.wait_for_everyone()
        return path

    def _opened_log(self) -> AbstractContextManager[DistillLog | None]:
        if not self._accelerator.is_main_process:
            return nullcontext()
        return DistillLog(
            self._folder.path,
            step=self._state.step,
            steps=self._settings.steps,
            console=self._console,
        )

    def _is_over(self) -> bool:
        patience = self._settings.patience
        return patience > 0 and self._state.since_best >= patience

    def _log(
        self, log: DistillLog | None, started: float, logged: tuple[float, int]
    ) -> tuple[float, int]:
        loss = self._accelerator.reduce(torch.stack(self._losses).mean(), "mean").item()
        self._losses.clear()
        settings, state, now = self._settings, self._state, time.monotonic()
        per_step = settings.micro_batch * settings.accumulation * settings.length
        per_step *= self._accelerator.num_processes
        if log is not None:
            counts = self._feed.counts
            log.losses(
                state.step,
                loss,
                self._trainer.rate(state.step - 1),
                seconds=now - started,
                tokens=state.step * per_step,
                speed=(state.step - logged[1]) * per_step / max(1e-9, now - logged[0]),
                counts=(counts.used, counts.cut, counts.dropped),
            )
        return now, state.step

    def _validate(self, log: DistillLog | None) -> None:
        assert self._validation is not None
        state = self._state
        score = _gathered(self._validation.run(self._trainer.student), self._accelerator)
        if log is not None:
            log.score(state.step, score)
        if state.best is not None and score.rank <= state.best:
            state.since_best += 1
            return
        state.best, state.since_best = score.rank, 0
        weights = self._weights()
        if self._accelerator.is_main_process:
            self._folder.write_student(weights, self._base, self._settings, "best")

    def _save(self, started: float) -> None:
        state, counts = self._state, self._feed.counts
        state.position, state.seconds = self._feed.position, time.monotonic() - started
        state.used, state.cut, state.dropped = counts.used, counts.cut, counts.dropped
        self._folder.save(self._accelerator, state)

    def _weights(self) -> dict[str, Tensor]:
        """Return the student's trained weights by name."""
        if is_sharded(self._accelerator):
            names = trainable(self._accelerator.unwrap_model(self._trainer.distiller))
            whole = self._accelerator.get_state_dict(self._trainer.distiller)  # on all processes
            kept = {name: tensor for name, tensor in whole.items() if name in names}
            return {name.removeprefix("student."): tensor for name, tensor in kept.items()}
        return {name: p.detach() for name, p in trainable(self._trainer.student).items()}


def _gathered(score: Score, accelerator: Any) -> Score:
    """Return the sum over all processes."""
    if accelerator.num_processes == 1:
        return score
    from accelerate.utils import gather_object

    parts: list[Score] = gather_object([score])
    return sum(parts, start=Score())
