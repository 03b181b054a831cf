"""Training: what one step of a draft adapter's training computes, on one device.

The base is frozen. Gradients are averaged over the processes of torch.distributed where it is set
up; files, the clock and the log are others'.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from d2f_export.distill.from_ar.answers import Answers
from d2f_export.distill.from_ar.draft_adapter import MASK_EMBEDDING, adapter_layers, new_adapter
from d2f_export.distill.from_ar.feed import Batch, Feed
from d2f_export.distill.from_ar.flat_weights import FlatWeights
from d2f_export.distill.from_ar.head_loss import ROWS, head_loss
from d2f_export.distill.from_ar.noise import Noise
from d2f_export.distill.from_ar.schedule import curriculum
from d2f_export.distill.from_ar.settings import DraftSettings
from d2f_export.distill.from_ar.streams import named_weights, streams_of
from d2f_export.distill.from_ar.visibility import Visibility
from d2f_runtime.models.transformer import Transformer

__all__ = ["Training", "Update"]

PREFETCHED: Final = 4  # batches that each worker keeps ready


@dataclass(frozen=True, slots=True)
class Update:
    """What a step was, scalars on the device.

    Attributes:
        loss: of the draft.
        norm: of the gradient, before it was clipped.
        skipped: 1 where a gradient was not finite and the weights were left alone.
    """

    loss: Tensor
    norm: Tensor
    skipped: Tensor


class _From(Sampler[int]):
    """Numbers from a first one on, without an end."""

    def __init__(self, first: int) -> None:
        self._first = first

    def __iter__(self) -> Iterator[int]:
        number = self._first
        while True:
            yield number
            number += 1


class Training:
    """One process's part of a training.

    Args:
        settings: of the run.
        model: the base; its weights are copied to the device.
        mask_id: the id that stands for a mask.
        device: of this process. A GPU computes in bf16 with fused kernels, a CPU in fp32.
        rank: of this process.
        num_ranks: processes.
    """

    def __init__(
        self,
        settings: DraftSettings,
        model: Transformer,
        *,
        mask_id: int,
        device: torch.device,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.settings, self.config, self.mask_id = settings, model.config, mask_id
        self.device, self.rank, self.num_ranks = device, rank, num_ranks
        self._fused = device.type == "cuda"
        dtype = torch.bfloat16 if self._fused else torch.float32
        weights = named_weights(model)
        frozen = {name: value.to(device, dtype) for name, value in weights.items()}
        self.base = streams_of(self.config, frozen, compiled=self._fused)
        factors = new_adapter(
            self.config, rank=settings.rank, seed=settings.seed, table=weights["table"]
        )
        self.flat = FlatWeights(factors, device=device, dtype=dtype)
        self.optimizer = torch.optim.AdamW(
            [self.flat.master], lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self._visibility = Visibility(
            settings.rows, settings.clean_length, settings.noisy_length, device, fused=self._fused
        )

    @property
    def tokens_per_step(self) -> int:
        """Noisy answer tokens of a step, over all processes."""
        return self.settings.rows * self.settings.noisy_length * self.num_ranks

    def states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the final states of the draft [R, N, D] and of the base [R, C, D]."""
        clean_mask, noisy_mask = self._visibility.masks(batch)
        with torch.no_grad():
            goal, cache = self.base.clean(batch["clean"], batch["clean_position"], clean_mask)
        drafted = self.base.noisy(
            batch["noisy"],
            batch["noisy_position"],
            cache,
            noisy_mask,
            mask_id=self.mask_id,
            mask_embedding=self.flat.named[MASK_EMBEDDING],
            adapters=adapter_layers(self.flat.named, self.config.num_layers),
        )
        return drafted, goal

    def loss(self, batch: Batch) -> Tensor:
        """Return the draft's loss at the masks that it can predict, a scalar."""
        states, goal = self.states(batch)
        clean_row = batch["teacher_row"]
        return head_loss(
            states.flatten(0, 1)[batch["student_row"]],
            goal.flatten(0, 1)[clean_row],
            batch["clean"].flatten()[clean_row + 1],
            batch["weight"],
            self.base.head,
            kind=self.settings.loss,
            fused=self._fused,
        )

    def update(self, batch: Batch, rate: float) -> Update:
        """Take one optimiser step, or none where a gradient is not finite.

        Nothing waits for the device.
        """
        loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        gradient = self.flat.gradient()
        if self.num_ranks > 1:
            dist.all_reduce(gradient)
            gradient /= self.num_ranks
        norm = gradient.norm()
        skipped = (~torch.isfinite(norm)).float()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.flat.master.grad = gradient.mul_((self.settings.clip / (norm + 1e-6)).clamp(max=1.0))
        # The fused optimiser leaves the weights alone where this is 1, without waiting for it.
        cast(Any, self.optimizer).found_inf = skipped
        self.optimizer.step()
        self.flat.refresh()
        return Update(loss.detach(), norm, skipped)

    def batches(self, answers: Answers, *, first: int) -> Generator[Batch, None, None]:
        """Yield this process's batches, on the device, from a number on and without an end."""
        settings = self.settings
        feed = Feed(
            answers,
            rows=settings.rows,
            clean_length=settings.clean_length,
            noisy_length=settings.noisy_length,
            mask_id=self.mask_id,
            seed=settings.seed,
            stages=curriculum(settings.block_sizes, settings.curriculum),
            noise=Noise(settings.window_blocks, settings.all_masked),
            pad_to=ROWS if self._fused else 1,
            rank=self.rank,
            num_ranks=self.num_ranks,
        )
        loader = DataLoader(
            feed,
            batch_size=None,
            sampler=_From(first),
            num_workers=settings.workers,
            pin_memory=self._fused,
            prefetch_factor=PREFETCHED if settings.workers else None,
        )
        for batch in loader:
            yield self.on_device(batch)

    def on_device(self, batch: Batch) -> Batch:
        """Move a batch to where the training is."""
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
