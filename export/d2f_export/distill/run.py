"""A distillation from settings to a student: opens and checks everything, then loops.

On several processes each runs this; the first one writes.
"""

import itertools
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from d2f_export.distill.base import Base, open_base
from d2f_export.distill.examples import ExampleFiles
from d2f_export.distill.feed import Feed
from d2f_export.distill.log import show_plan
from d2f_export.distill.loop import Loop
from d2f_export.distill.memory import check_fits, plan_memory
from d2f_export.distill.run_folder import RunFolder, RunState, prepare_checkpoints
from d2f_export.distill.sequences import Counts, Packing
from d2f_export.distill.settings import DistillSettings
from d2f_export.distill.trainer import (
    Compute,
    Trainer,
    available_bytes,
    is_sharded,
    open_accelerator,
    resolve,
)
from d2f_export.distill.validation import Validation
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_runtime.models.transformer import Transformer
from d2f_stream.core.errors import D2FError, InvalidRequest

__all__ = ["distill"]


def distill(
    settings: DistillSettings,
    output: Path,
    *,
    cpu: bool = False,
    console: Console | None = None,
) -> Path:
    """Distil a student, or go on with it where the folder holds a part of the run. Blocks.

    Args:
        settings: of the run.
        output: the run's folder; at the end also the student's.
        cpu: leave the GPUs alone.
        console: where plan, progress and counts are shown; None is silent.

    Returns:
        The student's folder.

    Raises:
        InvalidRequest: the data, the settings or the folder do not fit.
        ModelError: the teacher cannot be used.
        MissingExtra: peft or accelerate is not installed.
        D2FError: a checkpoint cannot be written, or the memory does not do after all.
    """
    base = open_base(settings.model)
    if settings.length > base.config.max_len:
        raise InvalidRequest(
            f"length is {settings.length} but {base.name} holds {base.config.max_len} tokens; "
            "lower it"
        )
    files = _files(settings, settings.data)
    num_examples = files.check()
    accelerator = open_accelerator(settings, cpu=cpu)
    compute = resolve(settings, accelerator.device.type)
    show = console if accelerator.is_main_process else None
    validation = _validation(settings, base, accelerator)
    _check_memory(settings, base, accelerator, compute, show)
    folder = RunFolder(output)
    if accelerator.is_main_process:
        folder.claim(settings)
    accelerator.wait_for_everyone()
    trainer = _trainer(settings, base, accelerator, compute)
    prepare_checkpoints(accelerator)
    state = folder.restore(accelerator, num_examples)
    if show is not None:
        action = f"goes on from step {state.step}" if state.step else "begins"
        show.print(f"{output}: {num_examples} examples, {action}", highlight=False)
    feed = _feed(settings, base, files, num_examples, state, accelerator)
    loop = Loop(settings, base, trainer, feed, folder, state, validation, show)
    try:
        loop.run()
    except torch.OutOfMemoryError as error:
        raise D2FError(
            f"the device ran out of memory after step {state.step}; lower micro_batch, logit_rows, "
            "validation_rows or length, or give it to nobody else, and start the command again"
        ) from error
    student = loop.finish()
    accelerator.end_training()
    return student


def _check_memory(
    settings: DistillSettings,
    base: Base,
    accelerator: Any,
    compute: Compute,
    console: Console | None,
) -> None:
    plan = plan_memory(
        base.config, settings, is_bf16=compute.is_bf16, is_flex=compute.attention == "flex"
    )
    available = available_bytes(accelerator.device)
    if console is not None:
        show_plan(console, plan, available)
    if not is_sharded(accelerator):  # a share of the plan would do
        check_fits(plan, available, settings)


def _files(settings: DistillSettings, paths: tuple[str, ...]) -> ExampleFiles:
    return ExampleFiles(
        paths, prompt_field=settings.prompt_field, answer_field=settings.answer_field
    )


def _validation(settings: DistillSettings, base: Base, accelerator: Any) -> Validation | None:
    if settings.validation is None:
        return None
    if is_sharded(accelerator):
        raise InvalidRequest(
            "validation decodes with whole weights, which FSDP splits; leave validation out"
        )
    files = _files(settings, (settings.validation,))
    files.check()
    examples = list(itertools.islice(files, settings.validation_examples))
    return Validation(
        base,
        examples,
        settings,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
    )


def _trainer(settings: DistillSettings, base: Base, accelerator: Any, compute: Compute) -> Trainer:
    """Load the weights onto the device."""

    def load(dtype: torch.dtype) -> Transformer:
        return load_checkpoint(base.folder, device=accelerator.device, dtype=dtype)

    student = load(torch.float32 if settings.full else compute.dtype)
    teacher = None
    if settings.full and settings.needs_teacher:
        teacher = load(compute.dtype).requires_grad_(False)
    return Trainer(settings, student, teacher, accelerator=accelerator, compute=compute)


def _feed(
    settings: DistillSettings,
    base: Base,
    files: ExampleFiles,
    num_examples: int,
    state: RunState,
    accelerator: Any,
) -> Feed:
    packing = Packing(
        codec=base.codec,
        end_id=base.end_id,
        padding_id=base.padding_id,
        length=settings.length,
        overlong=base.overlong if settings.overlong == "auto" else settings.overlong,
        min_answer=settings.min_answer,
        chat_template=settings.chat_template,
        counts=Counts(state.used, state.cut, state.dropped),
    )
    feed = Feed(
        files,
        num_examples,
        packing,
        seed=settings.seed,
        buffer=settings.shuffle_buffer,
        rows=settings.micro_batch,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
    )
    feed.position = state.position
    return feed
