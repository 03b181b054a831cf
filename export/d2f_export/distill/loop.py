"""The one training loop: optimiser steps and what is between them, whatever their objective.

Log, validation, checkpoints, the end. Objective and data are given.
"""

import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from d2f_export.distill.distiller import Distiller
from d2f_export.distill.feed import Batch, BatchSource
from d2f_export.distill.log import TrainingLog, plot_loss
from d2f_export.distill.run_folder import RunFolder, RunState, Writer, prepare_checkpoints
from d2f_export.distill.settings import TrainSettings
from d2f_export.distill.student import trainable
from d2f_export.distill.trainer import Trainer, is_sharded
from d2f_export.distill.validation import Score, Validation
from d2f_stream.core.errors import D2FError

__all__ = ["is_finished", "train"]


def train(
    settings: TrainSettings,
    folder: RunFolder,
    open_distiller: Callable[[], Distiller],
    open_feed: Callable[[RunState], BatchSource],
    *,
    write: Writer,
    accelerator: Any,
    num_examples: int = 0,
    validation: Validation | None = None,
    console: Console | None = None,
) -> Path:
    """Train, or go on where the folder holds a part of the run. Blocks.

    Args:
        settings: of the run.
        folder: the run's; at the end also the model's.
        open_distiller: loads what is trained, once the folder is known to be this run's.
        open_feed: returns the batches from where the run stands.
        write: puts the trained weights into a folder.
        accelerator: from open_accelerator.
        num_examples: in the data; 0 where they are endless.
        validation: None does without.
        console: where progress and counts are shown; None is silent.

    Returns:
        The model's folder.

    Raises:
        InvalidRequest: the folder or the data are those of another run.
        ModelDamaged: the run's checkpoint cannot be read.
        D2FError: a checkpoint cannot be written, or the memory does not do after all.
    """
    patience = 0 if validation is None else validation.patience
    if is_finished(folder, settings, patience=patience, console=console):
        return folder.path
    if accelerator.is_main_process:
        folder.claim(settings)
    accelerator.wait_for_everyone()
    trainer = Trainer(settings, open_distiller(), accelerator=accelerator)
    prepare_checkpoints(accelerator)
    state = folder.restore(accelerator, num_examples)
    if console is not None:
        action = f"goes on from step {state.step}" if state.step else "begins"
        data = f"{num_examples} examples, " if num_examples else ""
        console.print(f"{folder.path}: {data}{action}", highlight=False)
    loop = _Loop(
        settings,
        trainer,
        open_feed(state),
        folder,
        state,
        write=write,
        validation=validation,
        console=console,
    )
    try:
        loop.run()
    except torch.OutOfMemoryError as error:
        raise D2FError(
            f"the device ran out of memory after step {state.step}; lower micro_batch, logit_rows, "
            "validation_rows or length, or give it to nobody else, and start the command again"
        ) from error
    path = loop.finish()
    accelerator.end_training()
    return path


def is_finished(
    folder: RunFolder, settings: TrainSettings, *, patience: int, console: Console | None
) -> bool:
    """Whether nothing is left to do; a finished training is not begun anew."""
    end = folder.finished(settings, patience=patience)
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
        settings: of the run.
        trainer: takes the steps.
        feed: gives the batches.
        folder: the run's.
        state: where it stands; kept up to date.
        write: puts the trained weights into a folder.
        validation: None does without.
        console: None is silent, as on all processes but the first.
    """

    def __init__(
        self,
        settings: TrainSettings,
        trainer: Trainer,
        feed: BatchSource,
        folder: RunFolder,
        state: RunState,
        *,
        write: Writer,
        validation: Validation | None,
        console: Console | None,
    ) -> None:
        self._settings = settings
        self._trainer = trainer
        self._accelerator = trainer.accelerator
        self._feed = feed
        self._folder = folder
        self._state = state
        self._write = write
        self._validation = validation
        self._console = console
        self._losses: list[Tensor] = []

    def run(self) -> None:
        """Train to the last step, to the end of the time, or until validation gains no more."""
        settings, state, validation = self._settings, self._state, self._validation
        started = time.monotonic() - state.seconds
        logged = (state.seconds, state.tokens)
        with closing(self._counted_batches()) as batches, self._opened_log() as log:
            while (progress := state.progress(settings)) < 1.0 and not self._is_over():
                self._losses.append(self._trainer.step(state.step, batches, progress=progress))
                rate = self._trainer.rate(state.step, progress)
                state.step += 1
                state.seconds = self._agreed(time.monotonic() - started)
                last = state.progress(settings) >= 1.0
                if last or state.step % settings.log_every == 0:
                    self._log(log, rate, logged)
                    logged = (state.seconds, state.tokens)
                if validation is not None and (last or state.step % validation.every == 0):
                    self._validate(validation, log)
                if last or self._is_over() or state.step % settings.save_every == 0:
                    self._save()

    def finish(self) -> Path:
        """Write the model and the figure and say what became of the data."""
        weights = self._weights()
        path, state, counts = self._folder.path, self._state, self._feed.counts
        if self._accelerator.is_main_process:
            self._write(path, weights)
            plot_loss(path)
            self._folder.finish(state)
            if self._console is not None:
                self._console.print(
                    f"{state.step} steps; of {counts.used + counts.dropped} examples drawn "
                    f"{counts.used} were used ({counts.cut} cut) and {counts.dropped} dropped as "
                    f"too long; the model is in {path}",
                    highlight=False,
                )
        self._accelerator.wait_for_everyone()
        return path

    def _counted_batches(self) -> Generator[Batch, None, None]:
        with closing(self._feed.batches()) as batches:
            for batch in batches:
                self._state.tokens += batch.tokens.numel() * self._accelerator.num_processes
                yield batch

    def _opened_log(self) -> AbstractContextManager[TrainingLog | None]:
        if not self._accelerator.is_main_process:
            return nullcontext()
        return TrainingLog(self._folder.path, step=self._state.step, console=self._console)

    def _is_over(self) -> bool:
        return self._state.is_over(0 if self._validation is None else self._validation.patience)

    def _agreed(self, seconds: float) -> float:
        """Return the first process's clock, where the end depends on it: all must end together."""
        if self._settings.max_seconds is None or self._accelerator.num_processes == 1:
            return seconds
        from accelerate.utils import broadcast

        clock = torch.tensor(seconds, device=self._accelerator.device)
        return float(broadcast(clock))

    def _log(self, log: TrainingLog | None, rate: float, logged: tuple[float, int]) -> None:
        loss = self._accelerator.reduce(torch.stack(self._losses).mean(), "mean").item()
        self._losses.clear()
        if log is None:
            return
        state, counts = self._state, self._feed.counts
        log.losses(
            state.step,
            loss,
            rate,
            progress=state.progress(self._settings),
            seconds=state.seconds,
            tokens=state.tokens,
            speed=(state.tokens - logged[1]) / max(1e-9, state.seconds - logged[0]),
            counts=(counts.used, counts.cut, counts.dropped),
        )

    def _validate(self, validation: Validation, log: TrainingLog | None) -> None:
        state = self._state
        score = _gathered(validation.run(self._trainer.student), self._accelerator)
        if log is not None:
            log.score(state.step, score)
        if state.best is not None and score.rank <= state.best:
            state.since_best += 1
            return
        state.best, state.since_best = score.rank, 0
        weights = self._weights()
        if self._accelerator.is_main_process:
            self._write(self._folder.path / "best", weights)

    def _save(self) -> None:
        state, counts = self._state, self._feed.counts
        state.position = self._feed.position
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
