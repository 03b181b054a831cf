"""Trainer: the optimiser steps of a training, on accelerate.

Owns the distiller, its optimiser and what one step does; files, data and validation are others'.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from d2f_export.distill.corruption import noise_generator
from d2f_export.distill.distiller import Distiller
from d2f_export.distill.feed import Batch
from d2f_export.distill.settings import DistillSettings, TrainSettings
from d2f_export.distill.student import trainable
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
    attention = settings.attention
    if attention == "auto":
        attention = "flex" if is_cuda else "dense"
    if attention == "flex" and not is_cuda:
        raise InvalidRequest(
            "attention 'flex' needs a GPU, flex_attention has no backward pass on a CPU; choose "
            "'dense'"
        )
    is_bf16 = _is_bf16(settings, device_type)
    return Compute(torch.bfloat16 if is_bf16 else torch.float32, attention)


def open_accelerator(settings: TrainSettings, *, cpu: bool) -> Any:
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
    is_bf16 = _is_bf16(settings, device_type)
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
        distiller: on its device; what it trains requires a gradient and is fp32.
        accelerator: from open_accelerator.
    """

    def __init__(self, settings: TrainSettings, distiller: Distiller, *, accelerator: Any) -> None:
        self.settings = settings
        self.student = distiller.student
        self.accelerator = accelerator
        self._draw = distiller.draw  # bound before a process wraps its module
        is_fused = accelerator.device.type == "cuda" and not is_sharded(accelerator)
        optimizer = torch.optim.AdamW(
            _groups(distiller.train(), settings.weight_decay),
            lr=settings.lr,
            betas=(0.9, 0.95),
            fused=is_fused,
        )
        self.distiller, self._optimizer = accelerator.prepare(distiller, optimizer)

    def rate(self, step: int, progress: float) -> float:
        """Return the learning rate of a step.

        Args:
            step: counted from 0.
            progress: share of the training that is behind it, 0 to 1.
        """
        settings = self.settings
        share = min(1.0, (step + 1) / max(1, settings.warmup))
        if settings.decay > 0:
            share = min(share, (1.0 - progress) / settings.decay)
        return settings.lr * share

    def step(self, number: int, batches: Iterator[Batch], *, progress: float = 0.0) -> Tensor:
        """Take optimiser step `number`, from 0, and return its mean loss on this process.

        All randomness is a function of seed, step and process, so that a resumed run repeats it.
        """
        accelerator, settings = self.accelerator, self.settings
        for group in self._optimizer.param_groups:
            group["lr"] = self.rate(number, progress)
        losses = []
        for micro in range(settings.accumulation):
            index = number * settings.accumulation + micro
            noise = noise_generator(settings.seed, index, accelerator.process_index)
            batch = self._draw(next(batches), noise).to(accelerator.device)
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


def _is_bf16(settings: TrainSettings, device_type: str) -> bool:
    return settings.precision == "bf16" or (settings.precision == "auto" and device_type == "cuda")


def _groups(distiller: Distiller, weight_decay: float) -> list[dict[str, Any]]:
    """Return matrices and vectors; norms and biases do not decay."""
    parameters = trainable(distiller).values()
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
