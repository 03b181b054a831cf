"""A draft adapter from settings to its files: opens and checks everything, then trains.

Under torchrun each process runs this; the first one writes.
"""

from pathlib import Path
from typing import Final

import torch
from rich.console import Console

from d2f_export.distill.from_ar.base import free_mask_id, open_ar_base
from d2f_export.distill.from_ar.draft_adapter import check_start, read_adapter
from d2f_export.distill.from_ar.draft_training import DraftTraining
from d2f_export.distill.from_ar.examples import read_examples
from d2f_export.distill.from_ar.memory import check_draft_fits, plan_draft_memory
from d2f_export.distill.from_ar.settings import FREE, DraftSettings
from d2f_export.distill.from_ar.training import Training
from d2f_export.distill.log import show_plan
from d2f_export.distill.loop import is_finished, train
from d2f_export.distill.run_folder import RunFolder
from d2f_export.distill.settings import TrainSettings
from d2f_export.distill.trainer import available_bytes, open_accelerator
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_stream.core.errors import InvalidRequest

__all__ = ["train_draft"]

OLD_FILE: Final = "checkpoint.pt"  # what checkpoints were before they were as distill's


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
        ModelError: the base cannot be used, or the run's checkpoint cannot be read.
        MissingExtra: accelerate is not installed.
        D2FError: a checkpoint or the adapter cannot be written.
    """
    if (output / OLD_FILE).exists():
        raise InvalidRequest(
            f"{output} holds a training of an earlier version ({OLD_FILE}), which this one cannot "
            "go on with; choose a new folder, with from_adapter to begin with the adapter that "
            "it ended in"
        )
    accelerator = open_accelerator(TrainSettings(accumulation=1), cpu=cpu)
    show = console if accelerator.is_main_process else None
    folder = RunFolder(output, settings, free=FREE)
    if is_finished(folder, show):
        return output
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
    device: torch.device = accelerator.device
    plan = plan_draft_memory(base.config, settings, is_fused=device.type == "cuda")
    if show is not None:
        show_plan(show, plan, available_bytes(device))
        show.print(
            f"{len(answers)} examples ({num_dropped} too long), {answers.num_answer_tokens} answer "
            f"tokens, mask {mask_id}",
            highlight=False,
        )
    check_draft_fits(plan, available_bytes(device), settings)

    def open_training() -> DraftTraining:
        model = load_checkpoint(base.path, family=base.family, device="cpu", dtype=torch.float32)
        rank, num_ranks = accelerator.process_index, accelerator.num_processes
        training = Training(
            settings, model, mask_id=mask_id, device=device, rank=rank, num_ranks=num_ranks
        )
        return DraftTraining(training, answers, base, first)

    return train(folder, open_training, accelerator=accelerator, console=show)
