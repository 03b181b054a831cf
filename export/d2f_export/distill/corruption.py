"""Corruption of a batch: what the model sees of it, and where it has to predict.

The prompt is never masked. Answer blocks lie on a grid that starts at the prompt's end. Shapes: B
sequences, T positions, K blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from d2f_export.distill.feed import Batch

__all__ = [
    "BlockNoise",
    "Corrupted",
    "Corruption",
    "Schedule",
    "block_indices",
    "block_ratios",
    "draw_masks",
    "noise_generator",
    "uniform_ratios",
]

Schedule = Literal["monotone", "ramp", "random"]
T = TypeVar("T")

LOWEST_UNIFORM: Final = 0.02  # mask ratio of a sequence under uniform noise


@dataclass(frozen=True, slots=True)
class Corrupted:
    """A batch with its noise.

    Attributes:
        clean: [B, T] int64, the data.
        noisy: [B, T] int64, what the model sees.
        masked: [B, T] bool, where it has to predict.
        ratio: [B, T] fp32, the probability with which each position was masked.
        blocks: [B, T] int64, number of each position's block; -1 in the prompt.
        threshold: of the decoding step that is taken before the loss; None takes none.
    """

    clean: Tensor
    noisy: Tensor
    masked: Tensor
    ratio: Tensor
    blocks: Tensor
    threshold: float | None = None

    def to(self, device: torch.device) -> "Corrupted":
        """Return the batch on a device."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            clean=moved(self.clean),
            noisy=moved(self.noisy),
            masked=moved(self.masked),
            ratio=moved(self.ratio),
            blocks=moved(self.blocks),
        )


class Corruption(Protocol):
    """How batches are corrupted."""

    def draw(self, batch: Batch, generator: torch.Generator, *, mask_id: int) -> Corrupted:
        """Corrupt a batch; all randomness is the generator's, which is on the batch's device."""
        ...


@dataclass(frozen=True, slots=True)
class BlockNoise:
    """Masks answers block by block; the defaults are those of the released D2F training.

    Attributes:
        schedules: each batch draws one of these; see block_ratios.
        block_sizes: each batch draws one of these, tokens.
        low: lowest ratio; see block_ratios.
        high: highest ratio.
        uniform: share of the batches in which every sequence has one ratio for all its blocks,
            U(0.02, 1): the objective of LLaDA.
        stepped: share of the batches in which one decoding step is taken first: masks that the
            model gets right with a confidence above a drawn threshold are filled. What stays masked
            is what threshold decoding leaves: the hard tokens among easy ones.
    """

    schedules: tuple[Schedule, ...] = ("monotone",)
    block_sizes: tuple[int, ...] = (16,)
    low: float = 0.2
    high: float = 0.7
    uniform: float = 0.0
    stepped: float = 0.0

    def draw(self, batch: Batch, generator: torch.Generator, *, mask_id: int) -> Corrupted:
        """Corrupt a batch."""
        length, is_uniform = batch.tokens.shape[1], _happens(self.uniform, generator)
        schedule = self.schedules[0] if is_uniform else _chosen(self.schedules, generator)
        block_size = self.block_sizes[0] if is_uniform else _chosen(self.block_sizes, generator)
        blocks = block_indices(batch.prompt_lens, length, block_size)
        if is_uniform:
            ratio = uniform_ratios(len(blocks), LOWEST_UNIFORM, generator).expand(blocks.shape)
        else:
            num_blocks = max(1, int(blocks.max()) + 1)  # the batch's longest answer, as released
            ratios = block_ratios(
                schedule, len(blocks), num_blocks, generator, low=self.low, high=self.high
            )
            ratio = ratios.gather(1, blocks.clamp(min=0))
        masked = draw_masks(blocks, ratio, generator)
        noisy = batch.tokens.masked_fill(masked, mask_id)
        threshold = None
        if _happens(self.stepped, generator):
            threshold = 0.5 + 0.49 * _uniform(generator)
        return Corrupted(batch.tokens, noisy, masked, ratio, blocks, threshold)


def noise_generator(seed: int, index: int, rank: int) -> torch.Generator:
    """Return the source of randomness of one micro-batch, the same after a resume."""
    state = np.random.SeedSequence((seed, index, rank)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


def block_indices(prompt_lens: Tensor, length: int, block_size: int) -> Tensor:
    """Return [B, T] int64: -1 in the prompt, else the number of the answer block."""
    positions = torch.arange(length, device=prompt_lens.device)[None]
    return torch.div(positions - prompt_lens[:, None], block_size, rounding_mode="floor").clamp(-1)


def uniform_ratios(batch: int, low: float, generator: torch.Generator) -> Tensor:
    """Draw [B, 1] mask ratios from U(low, 1), stratified over the batch to lower the variance."""
    device = generator.device
    strata = torch.arange(batch, device=device) / batch
    u = (strata + torch.rand((), generator=generator, device=device)) % 1.0
    order = torch.randperm(batch, generator=generator, device=device)
    return (low + (1 - low) * u)[order, None]


def block_ratios(
    schedule: Schedule,
    batch: int,
    num_blocks: int,
    generator: torch.Generator,
    *,
    low: float = 0.2,
    high: float = 0.7,
) -> Tensor:
    """Draw [B, K] mask ratios per block.

    Args:
        schedule: "monotone" starts at U(low, high) and grows by iid uniform increments, never above
            `high`, the released D2F training code's rule (defaults 0.2 and 0.7).
            "ramp" is monotone too, 0 before a uniform frontier and 1 beyond a ramp of log-uniform
            width: the states that pipelined decoding passes through. "random" draws every block
            independently from U(low, high).
        batch: B.
        num_blocks: K.
        generator: source of randomness; its device is the result's.
        low: see schedule; unused by "ramp".
        high: see schedule; unused by "ramp".
    """
    device = generator.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    if schedule == "random":
        return low + (high - low) * uniform(batch, num_blocks)
    if schedule == "monotone":
        first = low + (high - low) * uniform(batch, 1)
        most = (high - first) / max(1, num_blocks - 1)
        steps = most * uniform(batch, num_blocks)
        steps[:, 0] = 0.0
        return first + steps.cumsum(dim=1)
    width = torch.exp2(uniform(batch, 1) * 5 - 2)  # 0.25 to 8 blocks
    frontier = uniform(batch, 1) * (num_blocks + width) - width
    blocks = torch.arange(num_blocks, device=device)[None]
    return ((blocks + 1 - frontier) / width).clamp(0.0, 1.0)


def draw_masks(blocks: Tensor, ratio: Tensor, generator: torch.Generator) -> Tensor:
    """Mask each position of an answer independently with its ratio; return [B, T] bool.

    Args:
        blocks: [B, T] int64, -1 in the prompt.
        ratio: [B, T] or [B, 1] fp32.
        generator: source of randomness, on the blocks' device.
    """
    draw = torch.rand(blocks.shape, generator=generator, device=blocks.device)
    return (blocks >= 0) & (draw < ratio)


def _chosen(choices: Sequence[T], generator: torch.Generator) -> T:
    if len(choices) == 1:
        return choices[0]
    return choices[int(_uniform(generator) * len(choices))]


def _happens(share: float, generator: torch.Generator) -> bool:
    return share >= 1.0 or (share > 0.0 and _uniform(generator) < share)


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, device=generator.device))
