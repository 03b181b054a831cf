"""The work of an ablation study: makes teachers, trains students and decodes with them.

Knows nothing of queues, processes and time limits; see ablations_queue.
"""

import csv
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from d2f_export.embedded_model.corpus import Corpus
from d2f_export.embedded_model.evaluate import evaluate, held_out
from d2f_export.embedded_model.recipe import RECIPES, STAGES, Stage, prepare
from d2f_export.stages import Objective
from d2f_export.training import TrainSettings, train
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.models.checkpoints import load_checkpoint, save_checkpoint
from d2f_runtime.models.transformer import Transformer
from d2f_runtime.text.tokenizer import Tokenizer
from d2f_stream.core.params import GenerationParams
from lab.ablations.settings import SETTINGS, UNTRAINED, Run

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
        compile_layers: see train.
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
        settings = replace(recipe.twin, seed=seed, max_seconds=twin_seconds)
        self._train("twin", prepare("twin", recipe, seed=seed), twin, settings)
        prepared = prepare("teacher", recipe, start=twin, block_share=0.0)
        settings = replace(recipe.teacher, seed=seed, max_seconds=seconds)
        self._train("teacher", prepared, beside, settings)
        save_checkpoint(beside, load_checkpoint(beside), dtype=torch.bfloat16)
        beside.rename(folder)

    def warm_up(self, name: str) -> None:
        """Compile what students need, by a few steps of one with fresh weights."""
        recipe = RECIPES[self.recipe]
        fresh = self.folder / name / "teacher"
        save_checkpoint(fresh, Transformer(recipe.config), dtype=torch.bfloat16)
        prepared = prepare("student", recipe, start=fresh, device=self.device)
        settings = replace(recipe.study, steps=WARM_UP_STEPS)
        self._train("student", prepared, self.folder / name / "student", settings)

    def run(self, run: Run, teacher: Path) -> dict[str, Any]:
        """Train a student and evaluate it; return its record."""
        record: dict[str, Any] = {**asdict(run), "teacher": teacher.name}
        began, folder = time.monotonic(), teacher
        if run.setting != UNTRAINED:
            folder = self.folder / run.folder
            record |= {"distillation": asdict(SETTINGS[run.setting])}
            record |= self._train_student(run, teacher, folder)
        trained = time.monotonic()
        record["points"] = self._evaluate(folder, run.problems)
        record["train_s"] = round(trained - began, 1)
        record["evaluate_s"] = round(time.monotonic() - trained, 1)
        on_gpu = self.device.startswith("cuda")
        return {**record, "device": torch.cuda.get_device_name() if on_gpu else "cpu"}

    def _train_student(self, run: Run, teacher: Path, folder: Path) -> dict[str, Any]:
        recipe = RECIPES[self.recipe]
        prepared = prepare(
            "student",
            recipe,
            start=teacher,
            distillation=SETTINGS[run.setting],
            device=self.device,
        )
        settings = replace(recipe.study, steps=run.steps, seed=run.seed)
        self._train("student", prepared, folder, settings)
        with (folder / "log.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        tail = rows[-max(1, round(TAIL * len(rows))) :]
        loss = statistics.mean(float(row["loss"]) for row in tail)
        return {"tokens": int(rows[-1]["tokens"]), "loss": round(loss, 5)}

    def _train(
        self,
        stage: Stage,
        prepared: tuple[Transformer, Objective],
        folder: Path,
        settings: TrainSettings,
    ) -> None:
        model, objective = prepared
        seed = settings.seed * 10 + STAGES.index(stage)
        corpus = Corpus(self.tokenizer, seed, num_workers=self.num_workers)
        train(
            model,
            objective,
            corpus,
            folder,
            settings,
            device=self.device,
            compile_layers=self.compile_layers,
        )

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
