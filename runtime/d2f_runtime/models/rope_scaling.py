"""How rotary frequencies are stretched beyond the context of the first training. Values alone.

The kinds are those of transformers' modeling_rope_utils (5.24.0); `rotary.rotary_frequencies`
computes them. One that a config names but that changes nothing up to the model's length ("dynamic")
has no value here.
"""

import math
from typing import Final

import msgspec

__all__ = [
    "LinearRope",
    "Llama3Rope",
    "LongRope",
    "ProportionalRope",
    "RopeScaling",
    "YarnRope",
    "rope_from_dict",
    "rope_to_dict",
]


class Llama3Rope(msgspec.Struct, frozen=True, tag_field="kind", tag="llama3"):
    """Llama 3.1's stretching of the rotary frequencies: the slow by `factor`, the fast not at all.

    Attributes:
        factor: by how much wavelengths beyond the trained context are stretched.
        low_freq_factor: wavelengths above the trained context divided by this are stretched fully.
        high_freq_factor: those below the trained context divided by this stay as they are.
        trained_len: the context before stretching, tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    trained_len: int


class LinearRope(msgspec.Struct, frozen=True, tag_field="kind", tag="linear"):
    """All frequencies divided by `factor`."""

    factor: float


class ProportionalRope(msgspec.Struct, frozen=True, tag_field="kind", tag="proportional"):
    """Divided by `factor`; only the first `num_turning` pairs of a head turn at all."""

    factor: float
    num_turning: int


class YarnRope(msgspec.Struct, frozen=True, tag_field="kind", tag="yarn"):
    """YaRN (arXiv 2309.00071): slow frequencies divided by `factor`, fast ones not, a ramp between.

    Attributes:
        factor: of the division; below 1 shrinks.
        trained_len: the context before stretching, tokens.
        beta_fast, beta_slow: turns within it at which the ramp begins and ends.
        attention_factor: by which cosines and sines are multiplied.
        truncate: whether the ramp begins and ends at whole pairs.
        query_beta: queries are multiplied by 1 + query_beta ln(1 + floor(position / trained_len)),
            as Ministral 3 and Nemotron-Labs-Diffusion do; 0 leaves them.
    """

    factor: float
    trained_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    query_beta: float = 0.0

    def ramp(self, theta: float, size: int) -> tuple[float, float]:
        """Return between which pairs of `size` turning dimensions the frequencies go over."""

        def pair(turns: float) -> float:
            wavelengths = self.trained_len / (turns * 2 * math.pi)
            return size * math.log(wavelengths) / (2 * math.log(theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        return low, high + 0.001 if low == high else high


class LongRope(msgspec.Struct, frozen=True, tag_field="kind", tag="longrope"):
    """LongRoPE's factors for contexts up to the trained one: one divisor for each frequency.

    Those for longer contexts would change what is cached already, so a model of this kind is run up
    to its trained length.
    """

    factors: tuple[float, ...]
    attention_factor: float = 1.0


RopeScaling = Llama3Rope | LinearRope | ProportionalRope | YarnRope | LongRope

KIND: Final = "kind"


def rope_to_dict(scaling: RopeScaling) -> dict[str, object]:
    """Return the fields as JSON-ready values; llama3's kind is left out, for older builds."""
    values: dict[str, object] = msgspec.to_builtins(scaling)
    if isinstance(scaling, Llama3Rope):
        del values[KIND]
    return values


def rope_from_dict(values: object) -> object:
    """Return what `rope_to_dict` made with its kind, to be converted; anything else unchanged."""
    if isinstance(values, dict) and KIND not in values:
        return {KIND: "llama3", **values}
    return values
