"""RunFolder: what a distillation leaves on disk, so that it can be killed and go on.

    settings.toml        what it was started with
    checkpoints/step-N   weights that are trained, optimiser, place in the data: the newest only
    log.csv, validation.csv, loss.png
    adapter_*            the student's LoRA; with full fine-tuning the checkpoint itself
    best/                the same, of the best validation

A checkpoint and a student are written beside their name and get it when they are whole.
"""

import os
import shutil
import tomllib
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from d2f_export.distill.base import Base
from d2f_export.distill.settings import FREE, DistillSettings, settings_of, to_toml
from d2f_export.distill.student import save_adapter, trainable
from d2f_runtime.models.checkpoints import save_checkpoint
from d2f_runtime.models.transformer import Transformer
from d2f_stream.core.errors import D2FError, InvalidRequest, ModelDamaged

__all__ = ["RunFolder", "RunState", "prepare_checkpoints"]

SETTINGS_FILE: Final = "settings.toml"
STATE_FILE: Final = "run.json"
BEGUN: Final = {f".{SETTINGS_FILE}", "checkpoints"}  # what a kill may leave before the settings
WEIGHTS_FILE: Final = "model.safetensors"
TOKENIZER_FILES: Final = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip


class RunState(msgspec.Struct, kw_only=True):
    """Where a run stands.

    Attributes:
        step: optimiser steps taken.
        position: examples drawn; see Feed.
        num_examples: in the data.
        used: examples that were packed; see Counts, as for the next two.
        cut: of these, those that were cut.
        dropped: examples that were too long.
        seconds: spent in training.
        best: accuracy and tokens per step of the best validation.
        since_best: validations after it.
    """

    step: int = 0
    position: int = 0
    num_examples: int = 0
    used: int = 0
    cut: int = 0
    dropped: int = 0
    seconds: float = 0.0
    best: tuple[float, float] | None = None
    since_best: int = 0


class RunFolder:
    """One run's folder.

    Args:
        path: made where needed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checkpoints = path / "checkpoints"

    def claim(self, settings: DistillSettings) -> None:
        """Write the settings, or compare them with those of the run that has begun here.

        Raises:
            InvalidRequest: the folder cannot be written, is another run's or no run's.
        """
        file = self.path / SETTINGS_FILE
        try:
            if not file.exists():
                self.path.mkdir(parents=True, exist_ok=True)
                if {file.name for file in self.path.iterdir()} - BEGUN:
                    raise InvalidRequest(
                        f"{self.path} holds something else than a distillation; choose a new folder"
                    )
                self._checkpoints.mkdir(exist_ok=True)
                _write(file, to_toml(settings))
                return
            old = settings_of(tomllib.loads(file.read_text(encoding="utf-8-sig")))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise InvalidRequest(f"{self.path} cannot be the output: {error}") from error
        has_begun = any(self._checkpoints.glob("step-*"))
        for name in settings.__struct_fields__:
            before, now = getattr(old, name), getattr(settings, name)
            if before != now and name not in FREE and has_begun:
                raise InvalidRequest(
                    f"{self.path} holds a distillation with {name} {before!r}, not {now!r}; go on "
                    "with the same settings, or choose a new folder"
                )
        _write(file, to_toml(settings))

    def save(self, accelerator: Any, state: RunState) -> None:
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
            accelerator.save_state(str(partial))
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

    def restore(self, accelerator: Any, num_examples: int) -> RunState:
        """Load the newest checkpoint into what the accelerator has prepared, if there is one.

        Raises:
            ModelDamaged: it cannot be read.
            InvalidRequest: the data is not what it was.
        """
        found = sorted(self._checkpoints.glob("step-*"))
        if not found:
            return RunState(num_examples=num_examples)
        try:
            accelerator.load_state(str(found[-1]))
            state = msgspec.json.decode((found[-1] / STATE_FILE).read_bytes(), type=RunState)
        except (OSError, RuntimeError, SafetensorError, msgspec.DecodeError) as error:
            raise ModelDamaged(
                f"the checkpoint {found[-1]} cannot be read: {error}; remove it to begin anew"
            ) from error
        if state.num_examples != num_examples:
            raise InvalidRequest(
                f"the data has {num_examples} examples, but {state.num_examples} when {self.path} "
                "was begun; give the same data, or choose a new folder"
            )
        return state

    def write_student(
        self, weights: dict[str, Tensor], base: Base, settings: DistillSettings, name: str = "."
    ) -> Path:
        """Write the student as a model or an adapter and return its folder. On the main process.

        Args:
            weights: those of the student that are trained, by name.
            base: of the student.
            settings: of the run.
            name: of the folder within this one.
        """
        folder = self.path / name
        if not settings.full:
            save_adapter(
                folder,
                weights,
                layout=base.layout,
                base=base.name,
                alpha=settings.lora_alpha,
                dropout=settings.lora_dropout,
            )
            return folder
        partial = self.path / ".student"
        shutil.rmtree(partial, ignore_errors=True)
        _write_whole(partial, weights, base, torch.float32)
        folder.mkdir(exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)  # without it the folder is no model
        for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, folder / file.name)
        partial.rmdir()
        return folder


def prepare_checkpoints(accelerator: Any) -> None:
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


def _write_whole(folder: Path, weights: dict[str, Tensor], base: Base, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        model = Transformer(base.config)
    model.load_state_dict(weights, strict=False, assign=True)
    if base.config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    save_checkpoint(folder, model, dtype=dtype)
    for name in TOKENIZER_FILES:
        if (base.folder / name).is_file():
            shutil.copyfile(base.folder / name, folder / name)


def _replace(folder: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)  # of an equal step: a run that was finished before
    os.replace(folder, target)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
