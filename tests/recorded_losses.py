"""Losses of short trainings of a tiny model on the CPU, as they were when two trainers existed.

    python -m tests.recorded_losses            compare with the record
    python -m tests.recorded_losses --write    make the record again

The record (recorded_losses.json) was made with the embedded model's own trainer and with `distill`
before the first became part of the second. Seeded cases repeat a loss step by step. In *mixed* ones
each batch draws a kind of noise of its own, so that only their mean is comparable.
"""

import argparse
import csv
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import torch

from d2f_export.distill.corruption import noise_generator
from d2f_export.distill.distiller import Distiller, Objective
from d2f_export.distill.feed import Batch
from d2f_export.distill.run import distill
from d2f_export.distill.settings import DistillSettings
from d2f_runtime.models.checkpoints import save_checkpoint
from d2f_runtime.models.transformer import Transformer
from lab.ablations.settings import SETTINGS
from lab.embedded_model.evaluate import held_out
from lab.embedded_model.recipe import RECIPES, Stage
from lab.embedded_model.stages import train_stage

__all__ = ["EXACT", "MIXED", "RECORD"]

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).with_suffix(".json")
TOKENIZER = ROOT / "export/checkpoints/word-problems/tokenizer.json"
RECIPE = RECIPES["tiny"]
STEPS = 30
SEEDS = (1, 2, 3, 4)  # of mixed cases


def stage(folder: Path, *, name: Stage, seed: int = 1) -> list[float]:
    """Train a stage of the embedded model, tiny, from fresh weights."""
    start = folder / "start"
    save_fresh(start, seed=7)
    settings = msgspec.structs.replace(
        getattr(RECIPE, name), tokenizer=str(TOKENIZER), steps=STEPS, seed=seed, lr=3e-3, warmup=5,
        start=None if name == "twin" else str(start),
    )  # fmt: skip
    return column(train_stage(settings, folder / "run", cpu=True) / "log.csv")


def teacher_on_uniform_masks(folder: Path) -> list[float]:
    """Train a teacher whose batches all have uniform masks."""
    return descended(RECIPE.objective("teacher", uniform=1.0), num_steps=STEPS)


def student(folder: Path, *, setting: str, num_steps: int = 4) -> list[float]:
    """Train a student by a setting of the ablations."""
    return descended(SETTINGS[setting], num_steps=num_steps)


def stepping_student(folder: Path) -> list[float]:
    """Train a student that first fills the masks it gets right with a confidence above 0.6225."""
    given = batch()
    given.tokens[given.tokens < 900] = 5  # so that most are soon right
    return descended(SETTINGS["data"], num_steps=STEPS, given=given, threshold=0.6225)


def descended(
    objective: Objective,
    *,
    num_steps: int,
    given: Batch | None = None,
    threshold: float | None = None,
) -> list[float]:
    """Take plain AdamW steps on one batch, whose noise is a function of the step."""
    model, teacher = fresh(0), fresh(7).requires_grad_(False)
    distiller = Distiller(model, teacher, objective, attention="dense", logit_rows=1000).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for number in range(num_steps):
        drawn = distiller.draw(given or batch(), noise_generator(0, number, 0))
        loss = distiller(replace(drawn, threshold=threshold))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def distilled(folder: Path, *, full: bool) -> list[float]:
    """Run `distill` from settings to the end, with all parts of its loss."""
    base = folder / "base"
    save_fresh(base, seed=7)
    (base / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    data = folder / "data.jsonl"
    lines = [json.dumps({"prompt": p.question, "answer": p.answer}) for p in held_out(40)]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = DistillSettings(
        model=str(base), data=(str(data),), length=192, chat_template=False, full=full, steps=STEPS,
        micro_batch=2, accumulation=2, lr=3e-3, warmup=5, log_every=1, lora_rank=4,
        schedule="monotone" if full else "ramp", block_size=8, forward_kl=0.5, reverse_kl=0.2,
        cross_entropy=0.3, shuffle_buffer=7,
    )  # fmt: skip
    return column(distill(settings, folder / "run", cpu=True) / "log.csv")


EXACT: dict[str, Callable[[Path], list[float]]] = {
    "twin": partial(stage, name="twin"),
    "teacher, uniform masks": teacher_on_uniform_masks,
    **{
        f"student, {name}": partial(
            student, setting=name, num_steps=STEPS if name == "published" else 4
        )
        for name in SETTINGS
        if name not in ("recipe", "stepped")
    },
    "student, stepped": stepping_student,
    "distill, LoRA": partial(distilled, full=False),
    "distill, full": partial(distilled, full=True),
}
MIXED: dict[str, Callable[[Path, int], list[float]]] = {
    "teacher": lambda folder, seed: stage(folder, name="teacher", seed=seed),
    "student": lambda folder, seed: stage(folder, name="student", seed=seed),
}


def fresh(seed: int) -> Transformer:
    """Return a tiny model with fresh weights."""
    model = Transformer(RECIPE.config)
    model.init_weights(seed)
    return model


def save_fresh(folder: Path, *, seed: int) -> None:
    """Write a checkpoint of a tiny model with fresh weights."""
    save_checkpoint(folder, fresh(seed), dtype=torch.float32)


def batch() -> Batch:
    """Return sequences of one length; one prompt is short, so that answers fill all blocks."""
    tokens = torch.randint(2, 1000, (8, 96), generator=torch.Generator().manual_seed(1))
    return Batch(tokens, torch.tensor([5, 9, 16, 7, 12, 20, 33, 48]))


def column(log: Path) -> list[float]:
    """Return the losses of a log."""
    with log.open(newline="", encoding="utf-8") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def measured() -> Iterator[tuple[str, list[float]]]:
    """Yield each case's losses; of the mixed ones, of all seeds."""
    for name, case in EXACT.items():
        with tempfile.TemporaryDirectory() as folder:
            yield name, case(Path(folder))
    for name, mixed in MIXED.items():
        for seed in SEEDS:
            with tempfile.TemporaryDirectory() as folder:
                yield f"{name}, seed {seed}", mixed(Path(folder), seed)


def main() -> None:
    """Compare with the record, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    losses = {}
    for name, values in measured():
        losses[name] = values = [float(f"{value:.6g}") for value in values]
        before = record.get(name, [math.nan])
        worst = max(abs(a / b - 1) for a, b in zip(values, before, strict=False))
        print(f"{name}: first {values[0]}, last {values[-1]}, largest difference {worst:.1e}")
    if arguments.write:
        lines = [f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in losses.items()]
        RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
