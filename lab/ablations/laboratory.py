"""The work of an ablation study: makes teachers, trains students and decodes with them.

Knows nothing of queues, processes and time limits; see queue.py.
"""

import csv
import shutil
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from msgspec.structs import replace

from d2f_export.distill.distiller import Objective
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.models.checkpoints import load_checkpoint, save_checkpoint
from d2f_runtime.models.transformer import Transformer
from d2f_runtime.text.tokenizer import Tokenizer
from d2f_stream.core.params import GenerationParams
from lab.ablations.settings import SETTINGS, UNTRAINED, Run
from lab.embedded_model.evaluate import evaluate, held_out
from lab.embedded_model.recipe import RECIPES, StageSettings
from lab.embedded_model.stages import train_stage

__all__ = ["POINTS", "Lab"]

POINTS: Final = tuple(
    GenerationParams(max_new_tokens=160, block_size=block_size, max_active_blocks=active)
    for block_size in (16, 32)
    for active in (4, 1)
)
TAIL: Final = 0.1  # of the log's rows; their mean is the final loss
WARM_UP_STEPS: Final = 8  # enough to meet every shape and both kinds of batches


@dataclass(frozen=True, slots=True)
class Lab:
    """What all runs of a study share.

    Attributes:
        folder: gets a folder for each training.
        tokenizer: a tokenizer.json.
        recipe: name of the model's sizes.
        device: "cpu" or "cuda".
        num_workers: processes that write problems.
        compile_layers: see train_stage.
    """

    folder: Path
    tokenizer: Path
    recipe: str
    device: str = "cpu"
    num_workers: int = 0
    compile_layers: bool = False

    def make_teacher(
        self, folder: Path, seed: int, *, twin_seconds: float | None, seconds: float | None
    ) -> None:
        """Train a twin and from it a teacher, whose weights in bf16 appear in `folder` at the end.

        Masks are uniform, as those of published diffusion models: no schedule is at home.
        """
        recipe, beside = RECIPES[self.recipe], folder.with_name(folder.name + ".part")
        twin = folder.with_name(folder.name + "-twin")
        self._train(replace(recipe.twin, seed=seed, max_seconds=twin_seconds), twin)
        settings = replace(recipe.teacher, seed=seed, max_seconds=seconds, start=str(twin))
        self._train(settings, beside, recipe.objective("teacher", uniform=1.0))
        save_checkpoint(folder, load_checkpoint(beside), dtype=torch.bfloat16)

    def warm_up(self, name: str) -> None:
        """Compile what students need, by a few steps of one with fresh weights."""
        recipe = RECIPES[self.recipe]
        fresh = self.folder / name / "teacher"
        save_checkpoint(fresh, Transformer(recipe.config), dtype=torch.bfloat16)
        settings = replace(recipe.study, steps=WARM_UP_STEPS, start=str(fresh))
        self._train(settings, self.folder / name / "student")

    def run(self, run: Run, teacher: Path) -> dict[str, Any]:
        """Train a student and evaluate it; return its record."""
        record: dict[str, Any] = {**asdict(run), "teacher": teacher.name}
        began, folder = time.monotonic(), teacher
        if run.setting != UNTRAINED:
            folder = self.folder / run.folder
            record |= {"objective": asdict(SETTINGS[run.setting])}
            record |= self._train_student(run, teacher, folder)
        trained = time.monotonic()
        record["points"] = self._evaluate(folder, run.problems)
        record["train_s"] = round(trained - began, 1)
        record["evaluate_s"] = round(time.monotonic() - trained, 1)
        on_gpu = self.device.startswith("cuda")
        return {**record, "device": torch.cuda.get_device_name() if on_gpu else "cpu"}

    def _train_student(self, run: Run, teacher: Path, folder: Path) -> dict[str, Any]:
        study = RECIPES[self.recipe].study
        settings = replace(study, steps=run.steps, seed=run.seed, start=str(teacher))
        self._train(settings, folder, SETTINGS[run.setting])
        with (folder / "log.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        tail = rows[-max(1, round(TAIL * len(rows))) :]
        loss = statistics.mean(float(row["loss"]) for row in tail)
        return {"tokens": int(rows[-1]["tokens"]), "loss": round(loss, 5)}

    def _train(
        self, settings: StageSettings, folder: Path, objective: Objective | None = None
    ) -> None:
        train_stage(
            replace(settings, tokenizer=str(self.tokenizer)),
            folder,
            objective=objective,
            num_workers=self.num_workers,
            cpu=self.device == "cpu",
            compile_layers=self.compile_layers,
        )
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # of many runs, some GiB

    def _evaluate(self, folder: Path, num_problems: int) -> list[dict[str, Any]]:
        codec, sample = Tokenizer(self.tokenizer), held_out(num_problems)
        # Read anew: the trained model is compiled for the shapes of training.
        model = load_checkpoint(folder, device=self.device, dtype=torch.float32)
        backend = TorchBackend(model, name=folder.name, device=self.device, runner="plain")
        points = []
        for params in POINTS:
            figures = evaluate(folder.name, backend, codec, sample, params).to_dict()
            names = ("block_size", "max_active_blocks", "confidence_threshold")
            setting = {name: getattr(params, name) for name in names}
            points.append(setting | {n: figures[n] for n in ("accuracy", "tokens_per_step")})
        backend.close()
        return points
