"""RunFolder: what a training leaves on disk, so that it can be killed and go on.

    settings.toml        what it was started with
    checkpoints/step-N   weights that are trained, optimiser, place in the data: the newest only
    log.csv, validation.csv, loss.png
    adapter_*            the student's LoRA; where all weights are trained, the model itself
    best/                the same, of the best validation
    finished.json        where the run stood when it ended; there once all the others are

A checkpoint and a model are written beside their name and get it when they are whole.
"""

import os
import pickle
import shutil
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import torch
from safetensors import SafetensorError
from torch import Tensor

from d2f_export.distill.settings import FREE, RunSettings, read_settings, to_toml
from d2f_export.distill.whole_files import write_text
from d2f_runtime.models.checkpoints import save_checkpoint
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.transformer import Transformer
from d2f_runtime.text.tokenizer import token_source
from d2f_stream.core.errors import D2FError, InvalidRequest, ModelDamaged

__all__ = [
    "RunFolder",
    "RunState",
    "Stored",
    "write_model",
]

SETTINGS_FILE: Final = "settings.toml"
STATE_FILE: Final = "run.json"
END_FILE: Final = "finished.json"
MODEL_FILES: Final = ("adapter_config.json", "config.json")  # one of them: the folder is a model
BEGUN: Final = {f".{SETTINGS_FILE}", "checkpoints"}  # what a kill may leave before the settings
DAMAGED: Final = (
    OSError, EOFError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError,
    msgspec.DecodeError,
)  # fmt: skip


class Stored(Protocol):
    """What a checkpoint holds beside the run's state."""

    def save(self, folder: Path) -> None:
        """Write what is trained and its optimiser into a folder. On all processes."""

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote. On all processes."""


class RunState(msgspec.Struct, kw_only=True):
    """Where a run stands.

    Attributes:
        step: optimiser steps taken.
        tokens: trained on by all processes.
        position: in the data, in the feed's unit; see BatchSource.
        num_examples: in the data.
        used: examples that were packed; see Counts, as for the next two.
        cut: of these, those that were cut.
        dropped: examples that were too long.
        skipped: steps that were left out because a gradient was not finite.
        seconds: spent in training.
        best: accuracy and tokens per step of the best validation.
        since_best: validations after it.
    """

    step: int = 0
    tokens: int = 0
    position: int = 0
    num_examples: int = 0
    used: int = 0
    cut: int = 0
    dropped: int = 0
    skipped: int = 0
    seconds: float = 0.0
    best: tuple[float, float] | None = None
    since_best: int = 0

    def progress(self, settings: RunSettings, since: "RunState") -> float:
        """Return the share that is done of the steps or of the time, at most 1.

        Args:
            settings: of the run.
            since: where the share is 0.
        """
        steps, timed = settings.steps - since.step, 0.0
        if settings.max_seconds is not None:
            timed = (self.seconds - since.seconds) / settings.max_seconds
        return min(1.0, max((self.step - since.step) / steps if steps > 0 else 1.0, timed))

    def is_over(self, patience: int) -> bool:
        """Whether validation has gained nothing for so long that the training ends."""
        return self.since_best >= patience > 0


class RunFolder:
    """One run's folder.

    Args:
        path: made where needed.
        settings: that the run is to begin or to go on with.
        free: the names of those that may differ from what it began with.
        patience: validations without a gain that end it; 0 is any number.
    """

    def __init__(
        self,
        path: Path,
        settings: RunSettings,
        *,
        free: Collection[str] = FREE,
        patience: int = 0,
    ) -> None:
        self.path, self.settings, self.patience = path, settings, patience
        self._free = free
        self._checkpoints = path / "checkpoints"

    def claim(self) -> None:
        """Write the settings, or compare them with those of the run that has begun here.

        Raises:
            InvalidRequest: the folder cannot be written, is another run's or no run's, or holds a
                finished run that cannot go on.
        """
        file = self.path / SETTINGS_FILE
        try:
            if not file.exists():
                self.path.mkdir(parents=True, exist_ok=True)
                if {file.name for file in self.path.iterdir()} - BEGUN:
                    raise InvalidRequest(
                        f"{self.path} holds something else than a training; choose a new folder"
                    )
                self._checkpoints.mkdir(exist_ok=True)
                write_text(file, to_toml(self.settings))
                return
            has_checkpoint = any(self._checkpoints.glob("step-*"))
            if has_checkpoint or self._end is not None:
                self._check_same()
            if not has_checkpoint and self._end is not None:
                raise InvalidRequest(
                    f"{self.path} holds a training that ended after {self._end.step} steps, and no "
                    "checkpoint that it could go on from; choose a new folder"
                )
        except OSError as error:
            raise InvalidRequest(f"{self.path} cannot be the output: {error}") from error
        write_text(file, to_toml(self.settings))

    def finished(self) -> RunState | None:
        """Return where the run ended, if the settings ask for no more than that.

        Raises:
            InvalidRequest: it is another run's folder, or cannot be read.
        """
        end = self._end
        if end is None:
            return None
        since = end if self.settings.is_per_start else RunState()
        if end.progress(self.settings, since) < 1.0 and not end.is_over(self.patience):
            return None
        self._check_same()
        return end

    def finish(self, state: RunState) -> None:
        """Say that the run has ended and that all of its files are there."""
        write_text(self.path / END_FILE, msgspec.json.encode(state).decode() + "\n")

    @property
    def _end(self) -> RunState | None:
        if not any((self.path / name).is_file() for name in MODEL_FILES):
            return None  # its model was taken away; a checkpoint gives it back
        try:
            return msgspec.json.decode((self.path / END_FILE).read_bytes(), type=RunState)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def save(self, accelerator: Any, stored: Stored, state: RunState) -> None:
        """Write a checkpoint; the one before it goes when this one is whole. On all processes.

        Raises:
            D2FError: it could not be written; the one before it is still there.
        """
        name = f"step-{state.step:08d}"
        partial, target = self._checkpoints / f".{name}", self._checkpoints / name
        try:
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            accelerator.wait_for_everyone()
            stored.save(partial)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                (partial / STATE_FILE).write_bytes(msgspec.json.encode(state))
                _replace(partial, target)
                for old in self._checkpoints.iterdir():
                    if old != target:
                        shutil.rmtree(old)
            accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise D2FError(
                f"the checkpoint {target} could not be written: {error}; free some space and start "
                "the same command again, it goes on from the checkpoint before"
            ) from error

    def restore(self, stored: Stored, num_examples: int) -> RunState:
        """Load the newest checkpoint, if there is one.

        Raises:
            ModelDamaged: it cannot be read.
            InvalidRequest: the data is not what it was.
        """
        found = sorted(self._checkpoints.glob("step-*"))
        if not found:
            return RunState(num_examples=num_examples)
        try:
            stored.load(found[-1])
            state = msgspec.json.decode((found[-1] / STATE_FILE).read_bytes(), type=RunState)
        except DAMAGED as error:
            raise ModelDamaged(
                f"the checkpoint {found[-1]} cannot be read: {error}; remove it to begin anew"
            ) from error
        if state.num_examples != num_examples:
            raise InvalidRequest(
                f"the data has {num_examples} examples, but {state.num_examples} when {self.path} "
                "was begun; give the same data, or choose a new folder"
            )
        return state

    def _check_same(self) -> None:
        """Refuse settings with which the run that has begun here would learn something else."""
        old, new = read_settings(self.path / SETTINGS_FILE), tomllib.loads(to_toml(self.settings))
        for name in dict.fromkeys([*new, *old]):
            before, now = old.get(name), new.get(name)
            if before != now and name not in self._free:
                raise InvalidRequest(
                    f"{self.path} holds a training with {name} {before!r}, not {now!r}; go on with "
                    "the same settings, or choose a new folder"
                )


def write_model(
    folder: Path,
    weights: dict[str, Tensor],
    *,
    config: TransformerConfig,
    beside: Path | None = None,
) -> None:
    """Write a whole model in fp32; its config, without which a folder is no model, comes last.

    Args:
        folder: made where needed; files of these names are replaced whole.
        weights: all of the model's, by name.
        config: of the model.
        beside: the folder or GGUF file whose tokenizer and chat template it gets.
    """
    partial = folder / ".model"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(weights, strict=False, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    save_checkpoint(partial, model, dtype=torch.float32)
    if beside is not None:
        token_source(beside).write(partial)
    (folder / "config.json").unlink(missing_ok=True)
    for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, folder / file.name)
    partial.rmdir()


def _replace(folder: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)  # of an equal step: a run that was finished before
    os.replace(folder, target)
