"""A distillation from settings to a student: opens and checks everything, then trains.

On several processes each runs this; the first one writes.
"""

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from d2f_export.distill.attention import use_flex
from d2f_export.distill.base import Base, open_base
from d2f_export.distill.corruption import BlockNoise
from d2f_export.distill.distillation import Distillation, Writer
from d2f_export.distill.distiller import Distiller, LossWeights, Objective
from d2f_export.distill.examples import ExampleFiles
from d2f_export.distill.feed import Feed
from d2f_export.distill.log import show_plan
from d2f_export.distill.loop import is_finished, train
from d2f_export.distill.memory import check_fits, plan_memory
from d2f_export.distill.run_folder import RunFolder, RunState, write_model
from d2f_export.distill.sequences import Counts, Packing
from d2f_export.distill.settings import DistillSettings
from d2f_export.distill.student import add_lora, save_adapter
from d2f_export.distill.trainer import (
    Compute,
    available_bytes,
    is_sharded,
    open_accelerator,
    resolve,
)
from d2f_export.distill.validation import Validation
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_runtime.models.transformer import Transformer
from d2f_stream.core.errors import InvalidRequest

__all__ = ["distill", "distiller_of"]


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
    accelerator = open_accelerator(settings, cpu=cpu)
    show = console if accelerator.is_main_process else None
    folder = RunFolder(output, settings, patience=settings.patience)
    if is_finished(folder, show):
        return output
    base = open_base(settings.model, family=settings.family)
    if settings.length > base.config.max_len:
        raise InvalidRequest(
            f"length is {settings.length} but {base.name} holds {base.config.max_len} tokens; "
            "lower it"
        )
    files = _files(settings, settings.data)
    num_examples = files.check()
    compute = resolve(settings, accelerator.device.type)
    validation = _validation(settings, base, accelerator)
    _check_memory(settings, base, accelerator, compute, show)
    return train(
        folder,
        lambda: Distillation(
            settings,
            _loaded(settings, base, accelerator, compute),
            accelerator=accelerator,
            open_feed=lambda state: _feed(settings, base, files, num_examples, state, accelerator),
            write=_writer(settings, base),
            validation=validation,
        ),
        accelerator=accelerator,
        num_examples=num_examples,
        console=show,
    )


def distiller_of(
    settings: DistillSettings,
    student: Transformer,
    teacher: Transformer | None,
    *,
    compute: Compute,
) -> Distiller:
    """Return what a distillation trains.

    Args:
        settings: of the distillation.
        student: on its device; gets its adapters here. With `full`, fp32.
        teacher: a frozen copy; with a LoRA there is none.
        compute: from resolve.
    """
    torch.manual_seed(settings.seed)
    if compute.attention == "flex":
        use_flex(student, compiled=student.embed_tokens.weight.is_cuda)
    if settings.full:
        student.requires_grad_(True)
    else:
        add_lora(
            student,
            rank=settings.lora_rank,
            alpha=settings.lora_alpha,
            dropout=settings.lora_dropout,
        )
    return Distiller(
        student,
        teacher,
        Objective(
            BlockNoise((settings.schedule,), (settings.block_size,), settings.low, settings.high),
            LossWeights(settings.forward_kl, settings.reverse_kl, settings.cross_entropy),
            mean_over=settings.mean_over,
        ),
        attention=compute.attention,
        checkpointing=settings.checkpointing,
        logit_rows=settings.logit_rows,
    )


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


def _loaded(settings: DistillSettings, base: Base, accelerator: Any, compute: Compute) -> Distiller:
    """Load the weights onto the device."""

    def load(dtype: torch.dtype) -> Transformer:
        return load_checkpoint(
            base.folder, family=base.family, device=accelerator.device, dtype=dtype
        )

    student = load(torch.float32 if settings.full else compute.dtype)
    teacher = None
    if settings.full and settings.needs_teacher:
        teacher = load(compute.dtype).requires_grad_(False)
    return distiller_of(settings, student, teacher, compute=compute)


def _writer(settings: DistillSettings, base: Base) -> Writer:
    if settings.full:
        return partial(write_model, config=base.config, beside=base.folder)
    return partial(
        save_adapter,
        layout=base.layout,
        base=base.name,
        alpha=settings.lora_alpha,
        dropout=settings.lora_dropout,
    )


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
