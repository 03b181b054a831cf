"""Distillation: a student's training as the loop drives it: steps, batches, validation, weights."""

from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file
from torch import Tensor

from d2f_export.distill.distiller import Distiller
from d2f_export.distill.feed import Batch, BatchSource
from d2f_export.distill.loop import Training
from d2f_export.distill.run_folder import RunState
from d2f_export.distill.settings import TrainSettings
from d2f_export.distill.student import trainable
from d2f_export.distill.trainer import Trainer, is_sharded
from d2f_export.distill.validation import Score, Validation

__all__ = ["Distillation", "Writer"]

Writer = Callable[[Path, dict[str, Tensor]], None]  # puts trained weights into a folder

WEIGHTS_FILE: Final = "model.safetensors"


class Distillation(Training):
    """One process's part of a training.

    Args:
        settings: of the run.
        distiller: what is trained, on its device.
        accelerator: from open_accelerator.
        open_feed: returns the batches from where the run stands.
        write: puts the trained weights into a folder.
        validation: None does without.
    """

    columns = ("examples", "cut", "dropped")
    sizes = "micro_batch, logit_rows, validation_rows or length"

    def __init__(
        self,
        settings: TrainSettings,
        distiller: Distiller,
        *,
        accelerator: Any,
        open_feed: Callable[[RunState], BatchSource],
        write: Writer,
        validation: Validation | None = None,
    ) -> None:
        self.rate = 0.0
        self.validate = None if validation is None else partial(self._validated, validation)
        self.validate_every = 0 if validation is None else validation.every
        self._accelerator = accelerator
        self._open_feed = open_feed
        self._write = write
        self._trainer = Trainer(settings, distiller, accelerator=accelerator)
        _keep_bases_out(accelerator)

    def save(self, folder: Path) -> None:
        """Write the trained weights and the optimiser, and say where the data stands."""
        state, counts = self._state, self._feed.counts
        state.position = self._feed.position
        state.used, state.cut, state.dropped = counts.used, counts.cut, counts.dropped
        self._accelerator.save_state(str(folder))

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote."""
        self._accelerator.load_state(str(folder))

    def begin(self, state: RunState) -> None:
        """Draw batches from where a run stands."""
        self._state = state
        self._feed = self._open_feed(state)
        self._batches = self._counted_batches()

    def step(self, progress: float) -> Tensor:
        """Take the next step and return its mean loss on this process."""
        number = self._state.step
        self.rate = self._trainer.rate(number, progress)
        return self._trainer.step(number, self._batches, progress=progress)

    def figures(self) -> tuple[int, int, int]:
        """Return how many examples were used, cut and dropped."""
        counts = self._feed.counts
        return counts.used, counts.cut, counts.dropped

    def write(self, folder: Path) -> None:
        """Write the student."""
        accelerator, student = self._accelerator, self._trainer.student
        weights = {name: p.detach() for name, p in trainable(student).items()}
        if is_sharded(accelerator):
            names = trainable(accelerator.unwrap_model(self._trainer.distiller))
            whole = accelerator.get_state_dict(self._trainer.distiller)  # on all processes
            kept = {name: tensor for name, tensor in whole.items() if name in names}
            weights = {name.removeprefix("student."): tensor for name, tensor in kept.items()}
        if accelerator.is_main_process:
            self._write(folder, weights)

    def summary(self) -> str:
        """Return what became of the examples."""
        used, cut, dropped = self.figures()
        return (
            f"of {used + dropped} examples drawn {used} were used ({cut} cut) and {dropped} "
            "dropped as too long"
        )

    def close(self) -> None:
        """Draw no more batches."""
        self._batches.close()

    def _validated(self, validation: Validation) -> Score:
        """Return the score over all processes."""
        score = validation.run(self._trainer.student)
        if self._accelerator.num_processes == 1:
            return score
        from accelerate.utils import gather_object

        parts: list[Score] = gather_object([score])
        return sum(parts, start=Score())

    def _counted_batches(self) -> Generator[Batch, None, None]:
        with closing(self._feed.batches()) as batches:
            for batch in batches:
                self._state.tokens += batch.tokens.numel() * self._accelerator.num_processes
                yield batch


def _keep_bases_out(accelerator: Any) -> None:
    """Let checkpoints hold the trained weights only: a LoRA's base is not copied each time."""

    def save(models: list[Any], weights: list[dict[str, Tensor]], folder: str) -> None:
        if weights:  # none under FSDP, which stores its shards itself
            weights[:] = [
                {name: p.detach() for name, p in trainable(accelerator.unwrap_model(m)).items()}
                for m in models
            ]

    def load(models: list[Any], folder: str) -> None:
        while models:
            model = accelerator.unwrap_model(models.pop())
            stored = load_file(Path(folder) / WEIGHTS_FILE)
            if stored.keys() != trainable(model).keys():
                raise RuntimeError("its weights are those of another student")
            model.load_state_dict(stored, strict=False)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
