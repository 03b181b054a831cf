"""Corruption of answers: which tokens a masked-diffusion model has to predict.

The prompt is never masked. Answer blocks lie on a grid that starts at the prompt's end. Shapes: B
sequences, T positions, K blocks.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Noisy", "Schedule", "block_indices", "block_ratios", "corrupt", "uniform_ratios"]

Schedule = Literal["monotone", "ramp", "random"]


@dataclass(frozen=True, slots=True)
class Noisy:
    """A corrupted batch.

    Attributes:
        tokens: [B, T] with masks.
        masked: [B, T] bool, True where a token was masked.
        ratio: [B, T] fp32, the probability with which each answer position was masked.
    """

    tokens: Tensor
    masked: Tensor
    ratio: Tensor


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


def corrupt(
    tokens: Tensor,
    prompt_lens: Tensor,
    ratio: Tensor,
    *,
    mask_id: int,
    generator: torch.Generator,
) -> Noisy:
    """Mask each answer token independently with its ratio.

    Args:
        tokens: [B, T] int64.
        prompt_lens: [B] int64.
        ratio: [B, T] or [B, 1] fp32.
        mask_id: id of the mask token.
        generator: source of randomness, on the tokens' device.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    answer = positions >= prompt_lens[:, None]
    ratio = ratio.expand(tokens.shape)
    draw = torch.rand(tokens.shape, generator=generator, device=tokens.device)
    masked = answer & (draw < ratio)
    return Noisy(tokens.masked_fill(masked, mask_id), masked, ratio)
