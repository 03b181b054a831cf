"""Trainer: the optimiser steps of a distillation, on accelerate.

Owns the distiller, its optimiser and what one step does; files, data and validation are others'.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from d2f_export.distill.attention import use_flex
from d2f_export.distill.corruption import Corruption, noise_generator
from d2f_export.distill.distiller import Distiller, LossWeights
from d2f_export.distill.feed import Batch
from d2f_export.distill.settings import DistillSettings
from d2f_export.distill.student import add_lora, trainable
from d2f_runtime.models.transformer import Transformer
from d2f_stream.core.errors import InvalidRequest, MissingExtra

__all__ = [
    "Compute",
    "Trainer",
    "available_bytes",
    "is_sharded",
    "open_accelerator",
    "resolve",
    "sharded_precision",
]


@dataclass(frozen=True, slots=True)
class Compute:
    """What "auto" means on a device.

    Attributes:
        dtype: of the frozen weights and of the products.
        attention: of the student.
    """

    dtype: torch.dtype
    attention: Literal["flex", "dense"]

    @property
    def is_bf16(self) -> bool:
        """Whether the products are in bf16."""
        return self.dtype == torch.bfloat16


def resolve(settings: DistillSettings, device_type: str) -> Compute:
    """Settle precision and attention for a device.

    Raises:
        InvalidRequest: flex_attention without a GPU.
    """
    is_cuda = device_type == "cuda"
    is_bf16 = settings.precision == "bf16" or (settings.precision == "auto" and is_cuda)
    attention = settings.attention
    if attention == "auto":
        attention = "flex" if is_cuda else "dense"
    if attention == "flex" and not is_cuda:
        raise InvalidRequest(
            "attention 'flex' needs a GPU, flex_attention has no backward pass on a CPU; choose "
            "'dense'"
        )
    return Compute(torch.bfloat16 if is_bf16 else torch.float32, attention)


def open_accelerator(settings: DistillSettings, *, cpu: bool) -> Any:
    """Return accelerate's view of the devices, as its launcher has set it up.

    Raises:
        MissingExtra: accelerate is not installed.
        InvalidRequest: the launcher chose FSDP 1.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise MissingExtra("distillation", "accelerate", "export") from error
    device_type = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
    is_bf16 = resolve(settings, device_type).is_bf16
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="bf16" if is_bf16 else "no",
        gradient_accumulation_steps=settings.accumulation,
    )
    if is_sharded(accelerator):
        # Where shards keep a micro-batch for themselves, the next forward pass now and then reads a
        # wrong row of the head (torch 2.11, on GPUs); see docs/distillation.md.
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise InvalidRequest(
                f"FSDP {plugin.fsdp_version} cannot hold weights of two precisions; choose version "
                "2 (--fsdp_version 2)"
            )
        plugin.mixed_precision_policy = sharded_precision(is_bf16=is_bf16)
    return accelerator


def sharded_precision(*, is_bf16: bool) -> Any:
    """Return FSDP's MixedPrecisionPolicy with which a share computes as a whole model does.

    Only weights are cast. accelerate's own policy also casts what a layer is given, the fp32 angles
    of the positions among it (torch 2.11 does not cast them again when it recomputes a layer, which
    then fails), and the mask ratios, the loss and the sums of the gradients.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if not is_bf16:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def available_bytes(device: torch.device) -> int:
    """Return the memory that is free on a GPU, or all that the machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def is_sharded(accelerator: Any) -> bool:
    """Whether processes hold a share of the weights each (FSDP)."""
    return str(accelerator.distributed_type.value) == "FSDP"


class Trainer:
    """Takes optimiser steps.

    Args:
        settings: of the training.
        student: on its device; gets its adapters here. With `full`, fp32.
        teacher: a frozen copy; with a LoRA there is none.
        accelerator: from open_accelerator.
        compute: from resolve.
    """

    def __init__(
        self,
        settings: DistillSettings,
        student: Transformer,
        teacher: Transformer | None,
        *,
        accelerator: Any,
        compute: Compute,
    ) -> None:
        torch.manual_seed(settings.seed)
        if compute.attention == "flex":
            use_flex(student, compiled=accelerator.device.type == "cuda")
        if settings.full:
            student.requires_grad_(True)
        else:
            add_lora(
                student,
                rank=settings.lora_rank,
                alpha=settings.lora_alpha,
                dropout=settings.lora_dropout,
            )
        self.settings = settings
        self.student = student
        self.accelerator = accelerator
        self._corruption = Corruption(
            schedule=settings.schedule,
            low=settings.low,
            high=settings.high,
            block_size=settings.block_size,
            mask_id=student.config.mask_id,
            teacher_input=settings.teacher_input,
        )
        weights = LossWeights(settings.forward_kl, settings.reverse_kl, settings.cross_entropy)
        distiller = Distiller(
            student,
            teacher,
            weights=weights,
            attention=compute.attention,
            checkpointing=settings.checkpointing,
            logit_rows=settings.logit_rows,
        ).train()
        optimizer = torch.optim.AdamW(
            _groups(distiller, settings.weight_decay), lr=settings.lr, betas=(0.9, 0.95)
        )
        self.distiller, self._optimizer = accelerator.prepare(distiller, optimizer)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        return self.settings.lr * min(1.0, (step + 1) / max(1, self.settings.warmup))

    def step(self, number: int, batches: Iterator[Batch]) -> Tensor:
        """Take optimiser step `number`, from 0, and return its mean loss on this process.

        All randomness is a function of seed, step and process, so that a resumed run repeats it.
        """
        accelerator, settings = self.accelerator, self.settings
        for group in self._optimizer.param_groups:
            group["lr"] = self.rate(number)
        losses = []
        for micro in range(settings.accumulation):
            index = number * settings.accumulation + micro
            noise = noise_generator(settings.seed, index, accelerator.process_index)
            batch = self._corruption.draw(next(batches), noise).to(accelerator.device)
            torch.manual_seed(noise.initial_seed())  # of dropout
            with accelerator.accumulate(self.distiller):
                loss = self.distiller(batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.distiller.parameters(), settings.clip)
                self._optimizer.step()
                self._optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        return torch.stack(losses).mean()


def _groups(distiller: Distiller, weight_decay: float) -> list[dict[str, Any]]:
    """Return matrices and vectors; norms and biases do not decay."""
    parameters = trainable(distiller).values()
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
