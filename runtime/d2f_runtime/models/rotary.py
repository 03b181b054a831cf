"""Rotary positions: the angles of a model's heads at canvas positions, and turning by them.

Frequencies are computed as transformers' modeling_rope_utils (5.24.0) does, in fp32 and in the same
order.

Shapes: B rows, W window positions, hd head size.
"""

import math
from typing import NamedTuple, assert_never

import torch
from torch import Tensor

from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.rope_scaling import (
    LinearRope,
    Llama3Rope,
    LongRope,
    ProportionalRope,
    RopeScaling,
    YarnRope,
)

__all__ = ["Rope", "attention_factor", "query_scale", "rotary", "rotary_frequencies", "rotate"]


class Rope(NamedTuple):
    """The angles of some positions.

    Attributes:
        cos, sin: [B, W, 1, hd] fp32, of keys.
        query_scale: [B, W, 1, 1] fp32, by which queries are multiplied; None leaves them.
    """

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None = None

    def turn(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return both, [B, W, heads, hd], turned."""
        turned = rotate(query, self.cos, self.sin)
        if self.query_scale is not None:
            turned = (turned.float() * self.query_scale).to(query.dtype)
        return turned, rotate(key, self.cos, self.sin)


def rotary_frequencies(config: TransformerConfig, device: torch.device | None = None) -> Tensor:
    """Return [hd / 2] fp32 angles per position, stretched where the config says so.

    Pairs beyond the `rotary_dim` of a head have the frequency 0: they do not turn.
    """
    size = config.rotary_dim or config.head_dim
    exponent = torch.arange(0, size, 2, device=device).float()
    frequency = config.rope_theta ** (-exponent / size)
    if config.rope_scaling is not None:
        frequency = _stretched(frequency, config.rope_scaling, config.rope_theta, size)
    still = frequency.new_zeros((config.head_dim - size) // 2)
    return torch.cat([frequency, still])


def attention_factor(scaling: RopeScaling | None) -> float:
    """Return what cosines and sines are multiplied by."""
    return scaling.attention_factor if isinstance(scaling, YarnRope | LongRope) else 1.0


def query_scale(positions: Tensor, scaling: RopeScaling | None) -> Tensor | None:
    """Return fp32 what the queries at canvas positions are multiplied by; None leaves them."""
    if not isinstance(scaling, YarnRope) or not scaling.query_beta:
        return None
    return 1 + scaling.query_beta * torch.log(1 + torch.floor(positions / scaling.trained_len))


def rotary(positions: Tensor, config: TransformerConfig) -> Rope:
    """Return the angles at canvas positions [B, W]."""
    frequency = rotary_frequencies(config, positions.device)
    angle = positions[:, :, None, None].float() * frequency
    angle = torch.cat([angle, angle], dim=-1)
    cos, sin = angle.cos(), angle.sin()
    factor = attention_factor(config.rope_scaling)
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    scale = query_scale(positions, config.rope_scaling)
    return Rope(cos, sin, None if scale is None else scale[:, :, None, None])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply half-split rotary embedding to [B, W, heads, hd] in fp32."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)


def _stretched(frequency: Tensor, scaling: RopeScaling, theta: float, size: int) -> Tensor:
    match scaling:
        case Llama3Rope():
            turns = scaling.trained_len * frequency / (2 * math.pi)  # within the trained context
            spread = scaling.high_freq_factor - scaling.low_freq_factor
            kept = ((turns - scaling.low_freq_factor) / spread).clamp(0, 1)
            return frequency * (kept + (1 - kept) / scaling.factor)
        case LinearRope():
            return frequency / scaling.factor
        case ProportionalRope():
            turning = torch.arange(len(frequency), device=frequency.device) < scaling.num_turning
            return frequency * turning / scaling.factor
        case YarnRope():
            low, high = scaling.ramp(theta, size)
            pair = torch.arange(size // 2, device=frequency.device).float()
            slow = ((pair - low) / (high - low)).clamp(0, 1)
            return frequency / scaling.factor * slow + frequency * (1 - slow)
        case LongRope():
            return frequency / torch.tensor(scaling.factors, device=frequency.device)
        case _:
            assert_never(scaling)
