"""DraftTraining: a draft adapter's training as the loop drives it: steps, batches, adapter."""

from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2f_export.distill.from_ar.answers import Answers
from d2f_export.distill.from_ar.base import ArBase
from d2f_export.distill.from_ar.draft_adapter import StoredAdapter, write_adapter
from d2f_export.distill.from_ar.schedule import rate_at
from d2f_export.distill.from_ar.settings import SIZES
from d2f_export.distill.from_ar.training import Training
from d2f_export.distill.loop import Training as LoopTraining
from d2f_export.distill.run_folder import RunState

__all__ = ["DraftTraining"]

FILE: Final = "draft.safetensors"


class DraftTraining(LoopTraining):
    """One process's part of a run.

    The random numbers of a step are a function of the seed and the step's number, so that is all
    of them that a checkpoint has to keep.

    Args:
        training: takes the steps.
        answers: what to learn from.
        base: of the adapter.
        first: the adapter that the run begins with; None begins with a fresh one.
    """

    columns = ("norm", "skipped")
    sizes = SIZES
    validate = None
    validate_every = 0

    def __init__(
        self, training: Training, answers: Answers, base: ArBase, first: StoredAdapter | None
    ) -> None:
        self.rate = 0.0
        self._training, self._answers, self._base = training, answers, base
        self._norms: list[Tensor] = []
        self._skipped: list[Tensor] = []
        if first is not None:
            training.flat.load(first.factors)

    def save(self, folder: Path) -> None:
        """Write the adapter and its optimiser, and say how many steps were skipped."""
        self._count()
        moments = self._training.optimizer.state_dict()["state"][0]
        if self._training.rank == 0:
            content = {"adapter": self._training.flat.master.detach(), **moments}
            save_file({name: value.cpu() for name, value in content.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote."""
        moments, optimizer = load_file(folder / FILE), self._training.optimizer
        with torch.no_grad():
            self._training.flat.master.copy_(moments.pop("adapter"))
        self._training.flat.refresh()
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": {0: moments}, "param_groups": groups})

    def begin(self, state: RunState) -> None:
        """Draw batches from where a run stands."""
        self._state = state
        self._batches = self._training.batches(self._answers, first=state.step)

    def step(self, progress: float) -> Tensor:
        """Take the next step and return its loss on this process; nothing waits for the device."""
        training, state = self._training, self._state
        self.rate = rate_at(training.settings, state.step, progress)
        update = training.update(next(self._batches), self.rate)
        self._norms.append(update.norm)
        self._skipped.append(update.skipped)
        state.tokens += training.tokens_per_step
        return update.loss

    def figures(self) -> tuple[str, int]:
        """Return the mean norm of the gradients since the last call, and the skipped steps."""
        self._count()
        norm = torch.stack(self._norms).mean().item()
        self._norms.clear()
        return f"{norm:.4g}", self._state.skipped

    def write(self, folder: Path) -> None:
        """Write the adapter."""
        training = self._training
        if training.rank != 0:
            return
        about: dict[str, Any] = {
            "kind": "draft",
            "mask_id": training.mask_id,
            "block_sizes": list(training.settings.block_sizes),
            "base": {"name": self._base.name, "sha256": self._base.sha256()},
            "tokens": self._state.tokens,
        }
        factors, rank = training.flat.stored(), training.settings.rank
        write_adapter(folder, factors, rank=rank, base=self._base.name, about=about)

    def summary(self) -> str:
        """Return what became of the steps."""
        return f"{self._state.tokens} tokens, {self._state.skipped} updates skipped"

    def close(self) -> None:
        """Draw no more batches."""
        self._batches.close()

    def _count(self) -> None:
        """Take over what the device has found; waits for it."""
        self._state.skipped += int(sum(float(skipped) for skipped in self._skipped))
        self._skipped.clear()
