"""One training loop for all objectives: AdamW, warm-up and linear decay, checkpoints, a CSV log.

A run lives in a folder: `state.pt` (weights, optimiser, position in the corpus; written to a
neighbour and renamed), `log.csv`, and at the end the checkpoint itself (config.json and
model.safetensors). Started again with the same settings, a run goes on from its last state.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from d2f_export.embedded_model.corpus import Batch
from d2f_export.stages import Objective
from d2f_export.training_log import TrainingLog
from d2f_runtime.models.checkpoints import save_checkpoint
from d2f_runtime.models.transformer import Transformer

__all__ = ["BatchSource", "TrainSettings", "train"]


class BatchSource(Protocol):
    """Where sequences come from."""

    def batches(self, tokens_per_batch: int, *, first_shard: int = 0) -> Iterator[Batch]:
        """Yield batches of about `tokens_per_batch` tokens for ever, from a shard on."""
        ...


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How long and how fast to train.

    Attributes:
        steps: optimiser steps in all.
        tokens_per_batch: padding included.
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        decay: share of the steps, at the end, over which the rate falls linearly to zero.
        weight_decay: of matrices; norms and biases have none.
        clip: largest gradient norm.
        seed: of weights (where fresh) and noise.
        save_every_s: seconds between saved states.
        log_every: steps between rows of log.csv.
        max_seconds: stop early, finishing the decay in time: the schedule follows whichever of
            steps and seconds is further on. None leaves time out of it.
    """

    steps: int
    tokens_per_batch: int = 98_304
    lr: float = 1e-3
    warmup: int = 100
    decay: float = 0.4
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: int = 0
    save_every_s: float = 120.0
    log_every: int = 50
    max_seconds: float | None = None


@dataclass(slots=True)
class _Run:
    """What changes while training."""

    step: int = 0
    shard: int = 0
    seconds: float = 0.0
    tokens: int = 0


def train(
    model: Transformer,
    objective: Objective,
    corpus: BatchSource,
    folder: Path,
    settings: TrainSettings,
    *,
    device: str = "cpu",
    compile_layers: bool = False,
) -> None:
    """Train `model` in place and leave its checkpoint in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(device).train()
    optimizer = _optimizer(model, settings, device)
    run = _restore(folder, model, optimizer, device)
    if run.step == 0:
        (folder / "log.csv").unlink(missing_ok=True)  # of a run that left no state
    if compile_layers:
        for network in (model, *objective.frozen):
            for layer in network.layers:
                layer.compile(dynamic=True)
    seed = settings.seed * 7_919 + run.step
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    batches = corpus.batches(settings.tokens_per_batch, first_shard=run.shard)
    with TrainingLog(folder, every=settings.log_every) as log:
        _loop(model, objective, optimizer, batches, run, folder, settings, generator, log)
    save_checkpoint(folder, model, dtype=torch.float32)
    (folder / "state.pt").unlink(missing_ok=True)


def _loop(
    model: Transformer,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    run: _Run,
    folder: Path,
    settings: TrainSettings,
    generator: torch.Generator,
    log: TrainingLog,
) -> None:
    device = generator.device
    started, saved = time.monotonic() - run.seconds, time.monotonic()
    while (progress := _progress(run, settings)) < 1.0:
        batch = next(batches)
        rate = settings.lr * _rate(run.step, progress, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens = torch.from_numpy(batch.tokens).to(device, non_blocking=True)
        prompt_lens = torch.from_numpy(batch.prompt_lens).to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = objective(model, tokens, prompt_lens, generator)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.step, run.shard = run.step + 1, batch.shard
        run.tokens += tokens.numel()
        run.seconds = time.monotonic() - started
        log.row(loss, rate, progress, step=run.step, seconds=run.seconds, tokens=run.tokens)
        if time.monotonic() - saved > settings.save_every_s:
            _save(folder, model, optimizer, run)
            saved = time.monotonic()


def _progress(run: _Run, settings: TrainSettings) -> float:
    timed = 0.0 if settings.max_seconds is None else run.seconds / settings.max_seconds
    return max(run.step / settings.steps, timed)


def _rate(step: int, progress: float, settings: TrainSettings) -> float:
    """Share of the peak learning rate."""
    return min(1.0, (step + 1) / settings.warmup, (1.0 - progress) / settings.decay)


def _optimizer(model: Transformer, settings: TrainSettings, device: str) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = device.startswith("cuda")
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=fused)


def _save(folder: Path, model: Transformer, optimizer: torch.optim.Optimizer, run: _Run) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "run": asdict(run)}
    partial = folder / "state.pt.partial"
    torch.save(state, partial)
    os.replace(partial, folder / "state.pt")


def _restore(
    folder: Path, model: Transformer, optimizer: torch.optim.Optimizer, device: str
) -> _Run:
    path = folder / "state.pt"
    if not path.exists():
        return _Run()
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return _Run(**state["run"])
