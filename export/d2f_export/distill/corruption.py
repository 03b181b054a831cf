"""Corruption of a batch: what the student sees, what the teacher sees, where the loss is.

Shapes: B sequences, T positions.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from d2f_export.distill.feed import Batch
from d2f_export.noise import Schedule, block_indices, block_ratios, corrupt

__all__ = ["Corrupted", "Corruption", "noise_generator"]


@dataclass(frozen=True, slots=True)
class Corrupted:
    """A batch with its noise.

    Attributes:
        clean: [B, T] int64, the data.
        student: [B, T] int64, with the student's masks.
        teacher: [B, T] int64, with the teacher's masks.
        masked: [B, T] bool, where the loss is: masked for both.
        ratio: [B, T] fp32, the mask ratio p of each position's block.
        blocks: [B, T] int64, number of each position's block; -1 in the prompt.
    """

    clean: Tensor
    student: Tensor
    teacher: Tensor
    masked: Tensor
    ratio: Tensor
    blocks: Tensor

    def to(self, device: torch.device) -> "Corrupted":
        """Return the batch on a device."""
        return Corrupted(
            *(getattr(self, name).to(device, non_blocking=True) for name in self.__slots__)
        )


@dataclass(frozen=True, slots=True)
class Corruption:
    """How batches are corrupted.

    Attributes:
        schedule: see block_ratios, as for low and high.
        low: lowest ratio.
        high: highest ratio.
        block_size: of the grid that starts at the prompt's end, tokens.
        mask_id: id of the mask token.
        teacher_input: "same" shows the teacher the student's masks, as the released code does;
            "fresh" draws masks with the same ratios for it, and the loss is where both masked.
    """

    schedule: Schedule
    low: float
    high: float
    block_size: int
    mask_id: int
    teacher_input: Literal["same", "fresh"]

    def draw(self, batch: Batch, generator: torch.Generator) -> Corrupted:
        """Corrupt a batch; the prompt is never masked."""
        tokens, prompt_lens = batch.tokens, batch.prompt_lens
        blocks = block_indices(prompt_lens, tokens.shape[1], self.block_size)
        num_blocks = int(blocks.max()) + 1  # the batch's longest answer, as the released code
        ratios = block_ratios(
            self.schedule, len(tokens), max(1, num_blocks), generator, low=self.low, high=self.high
        )
        ratio = ratios.gather(1, blocks.clamp(min=0))
        student = corrupt(tokens, prompt_lens, ratio, mask_id=self.mask_id, generator=generator)
        teacher = student
        if self.teacher_input == "fresh":
            teacher = corrupt(tokens, prompt_lens, ratio, mask_id=self.mask_id, generator=generator)
        masked = student.masked & teacher.masked
        return Corrupted(tokens, student.tokens, teacher.tokens, masked, ratio, blocks)


def noise_generator(seed: int, index: int, rank: int) -> torch.Generator:
    """Return the source of randomness of one micro-batch, the same after a resume."""
    state = np.random.SeedSequence((seed, index, rank)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)
