"""A draft adapter's training from settings to the adapter: opens and checks everything, then loops.

Under torchrun each process runs this; the first one writes.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from rich.console import Console

from d2f_export.distill.from_ar.answers import Answers
from d2f_export.distill.from_ar.base import ArBase, free_mask_id, open_ar_base
from d2f_export.distill.from_ar.checkpoint import Progress, read_checkpoint, write_checkpoint
from d2f_export.distill.from_ar.draft_adapter import check_start, read_adapter, write_adapter
from d2f_export.distill.from_ar.examples import read_examples
from d2f_export.distill.from_ar.memory import check_draft_fits, plan_draft_memory
from d2f_export.distill.from_ar.schedule import rate_at
from d2f_export.distill.from_ar.settings import FREE, DraftSettings
from d2f_export.distill.from_ar.training import Training, Update
from d2f_export.distill.log import show_plan
from d2f_export.distill.run_folder import SETTINGS_FILE, check_same, no_training
from d2f_export.distill.settings import to_toml
from d2f_export.distill.trainer import available_bytes
from d2f_export.distill.whole_files import write_text
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_stream.core.errors import D2FError, InvalidRequest

__all__ = ["train_draft"]

LOG_FILE: Final = "log.jsonl"


def train_draft(
    settings: DraftSettings,
    output: Path,
    *,
    cpu: bool = False,
    console: Console | None = None,
) -> Path:
    """Train a draft adapter, or go on with one where the folder holds a part of it. Blocks.

    Args:
        settings: of the run.
        output: the run's folder, and the adapter's.
        cpu: leave the GPUs alone.
        console: where plan and progress are shown; None is silent.

    Returns:
        The adapter's folder.

    Raises:
        InvalidRequest: the data, the settings or the folder do not fit, or the memory is too small.
        ModelError: the base cannot be used.
        D2FError: a checkpoint cannot be written.
    """
    base = open_ar_base(settings.from_ar, family=settings.family)
    first = None
    if settings.from_adapter is not None:
        first = read_adapter(Path(settings.from_adapter), base.config)
        check_start(first, settings, base.sha256())
    mask_id = settings.mask_id
    if mask_id is None:
        mask_id = free_mask_id(base) if first is None else first.mask_id
    if mask_id in base.config.eos_ids:
        raise InvalidRequest(f"mask_id is {mask_id}, but that id ends the answers of {base.name}")
    answers, num_dropped = read_examples(settings, base)
    with _processes(cpu=cpu) as (device, rank, num_ranks):
        show = console if rank == 0 else None
        plan = plan_draft_memory(base.config, settings, is_fused=device.type == "cuda")
        if show is not None:
            show_plan(show, plan, available_bytes(device))
        check_draft_fits(plan, available_bytes(device), settings)
        if rank == 0:
            _claim(output, settings)
        model = load_checkpoint(base.path, family=base.family, device="cpu", dtype=torch.float32)
        training = Training(
            settings, model, mask_id=mask_id, device=device, rank=rank, num_ranks=num_ranks
        )
        del model
        progress = read_checkpoint(output, training)
        if first is not None and not progress.step:
            training.flat.load(first.factors)
        if show is not None:
            show.print(
                f"{output}: {len(answers)} examples ({num_dropped} too long), "
                f"{answers.num_answer_tokens} answer tokens, mask {mask_id}, "
                f"from step {progress.step}",
                highlight=False,
            )
        _Loop(training, answers, output, progress, show).run()
        if rank == 0:
            _finish(training, base, output, progress)
    return output


class _Loop:
    """One start of a run."""

    def __init__(
        self,
        training: Training,
        answers: Answers,
        folder: Path,
        progress: Progress,
        console: Console | None,
    ) -> None:
        self._training, self._answers, self._folder = training, answers, folder
        self._progress, self._console = progress, console
        self._first = progress.step
        self._started = time.monotonic()
        self._before = progress.seconds
        self._held: list[Update] = []
        self._last = self._started
        self._timed = 0.0  # share of the seconds that are over, as of the last look

    def run(self) -> None:
        """Train until the steps are taken or the time is over."""
        settings, progress = self._training.settings, self._progress
        part = self._part()
        for batch in self._training.batches(self._answers, first=progress.step):
            if part >= 1.0:
                break
            rate = rate_at(settings, progress.step, part)
            self._held.append(self._training.update(batch, rate))
            progress.step += 1
            progress.tokens += self._training.tokens_per_step
            if progress.step % settings.log_every == 0:
                self._log(rate)
            if progress.step % settings.save_every == 0:
                self._save()
            part = self._part()
        self._save()

    def _part(self) -> float:
        """Return the share of this start that is done, the same in all processes."""
        settings, step = self._training.settings, self._progress.step
        whole = settings.steps - self._first
        done = (step - self._first) / whole if whole > 0 else 1.0
        if settings.max_seconds is not None and step % settings.log_every == 0:
            timed = torch.tensor((time.monotonic() - self._started) / settings.max_seconds)
            if self._training.num_ranks > 1:  # one clock counts
                timed = timed.to(self._training.device)
                dist.broadcast(timed, 0)
            self._timed = float(timed)
        return min(1.0, max(done, self._timed))

    def _count(self) -> None:
        """Take over what the device has found; waits for it."""
        self._progress.skipped += int(sum(float(update.skipped) for update in self._held))
        self._progress.seconds = self._before + time.monotonic() - self._started

    def _log(self, rate: float) -> None:
        self._count()
        now = time.monotonic()
        count = len(self._held)
        speed = count * self._training.tokens_per_step / (now - self._last)
        row = asdict(self._progress) | {
            "seconds": round(self._progress.seconds, 1),
            "loss": round(sum(float(update.loss) for update in self._held) / count, 5),
            "norm": round(sum(float(update.norm) for update in self._held) / count, 4),
            "rate": round(rate, 8),
            "tokens_per_s": round(speed),
        }
        self._held, self._last = [], now
        if self._training.rank == 0:
            with (self._folder / LOG_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if self._console is not None:
            self._console.print(
                f"step {row['step']} loss {row['loss']:.4f} {speed:,.0f} tokens/s "
                f"({row['skipped']} updates skipped)",
                highlight=False,
            )

    def _save(self) -> None:
        if self._held:
            self._count()
            self._held = []
        if self._training.rank == 0:
            write_checkpoint(self._folder, self._training, self._progress)


def _claim(folder: Path, settings: DraftSettings) -> None:
    """Write the settings, or compare them with those of the run that has begun here."""
    file = folder / SETTINGS_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if file.exists():
            check_same(folder, settings, free=FREE)
        elif any(folder.iterdir()):
            raise no_training(folder)
        write_text(file, to_toml(settings))
    except OSError as error:
        raise InvalidRequest(f"{folder} cannot be the output: {error}") from error


def _finish(training: Training, base: ArBase, folder: Path, progress: Progress) -> None:
    about = {
        "kind": "draft",
        "mask_id": training.mask_id,
        "block_sizes": list(training.settings.block_sizes),
        "base": {"name": base.name, "sha256": base.sha256()},
        "tokens": progress.tokens,
    }
    rank = training.settings.rank
    try:
        write_adapter(folder, training.flat.stored(), rank=rank, base=base.name, about=about)
    except OSError as error:
        raise D2FError(
            f"the adapter could not be written into {folder}: {error}; start the same command "
            "again, it goes on from the last checkpoint"
        ) from error


@contextmanager
def _processes(*, cpu: bool) -> Iterator[tuple[torch.device, int, int]]:
    """Join the processes that torchrun has started; yields device, rank and their number."""
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available() and not cpu:
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if num_ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device, rank, num_ranks
    finally:
        if num_ranks > 1:
            dist.destroy_process_group()
