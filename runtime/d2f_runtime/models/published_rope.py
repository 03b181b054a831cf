"""From what a published config says of rotary positions to a `RopeScaling`.

The keys, in `rope_parameters` or in the older `rope_scaling`, mean what transformers reads out of
them (modeling_rope_utils, 5.24.0).
"""

import logging
import math
from dataclasses import dataclass
from typing import Final

from d2f_runtime.models.config_file import ConfigFile
from d2f_runtime.models.rope_scaling import (
    LinearRope,
    Llama3Rope,
    LongRope,
    ProportionalRope,
    RopeScaling,
    YarnRope,
)
from d2f_stream.core.errors import ModelDamaged, UnsupportedModel

__all__ = ["PublishedRope", "rope_section"]

logger = logging.getLogger("d2f_stream.published")

KINDS: Final = ("default", "dynamic", "linear", "llama3", "longrope", "proportional", "yarn")
TRAINED: Final = "original_max_position_embeddings"


@dataclass(frozen=True, slots=True)
class PublishedRope:
    """Rotary positions of a model.

    Attributes:
        theta: base of the frequencies.
        scaling: how they are stretched; None leaves them.
        max_len: how many positions a model of this kind is run for, tokens.
    """

    theta: float
    scaling: RopeScaling | None
    max_len: int

    @classmethod
    def read(
        cls,
        config: ConfigFile,
        *,
        head_dim: int,
        theta: float | None = 10_000.0,
        is_partial: bool = False,
        scales_queries: bool = False,
    ) -> "PublishedRope":
        """Read config.json.

        Args:
            config: of the model.
            head_dim: how many dimensions of a head there are to turn.
            theta: base where it names none; None where it must.
            is_partial: whether the family turns a part of each head, by `partial_rotary_factor`.
            scales_queries: whether it multiplies queries, by `llama_4_scaling_beta`.

        Raises:
            UnsupportedModel: a kind that this build does not know.
            ModelDamaged: a key is missing or of the wrong kind.
        """
        rope = rope_section(config)
        if nested := sorted(key for key, value in rope.values.items() if isinstance(value, dict)):
            raise UnsupportedModel(
                f"{rope.path} has rotary positions of their own for {nested[0]}, but this build "
                "has the same for all layers"
            )
        kind = rope.values.get("rope_type", rope.values.get("type", "default"))
        if kind not in KINDS:
            raise UnsupportedModel(
                f"{rope.path} scales its rotary positions by {kind!r:.100}, but this build knows "
                f"{', '.join(KINDS)}"
            )
        if scales_queries and kind != "yarn" and "llama_4_scaling_beta" in rope:
            raise UnsupportedModel(
                f"{rope.path} has a llama_4_scaling_beta with positions of the rope_type {kind!r}, "
                "but this build knows it with yarn"
            )
        theta = (rope if "rope_theta" in rope else config).number("rope_theta", theta)
        max_len = config.integer("max_position_embeddings")
        if kind == "default":
            return cls(theta, None, max_len)
        if not is_partial and kind != "proportional":
            _refuse_partial(rope, config)
        # Beside the others, or in the file itself, which transformers prefers.
        trained = config.integer(TRAINED, rope.values.get(TRAINED, max_len))
        scaling: RopeScaling | None = None
        match kind:
            case "dynamic":  # stretches beyond max_position_embeddings alone, which is the limit
                rope.number("factor")
            case "linear":
                scaling = LinearRope(rope.number("factor"))
            case "llama3":
                scaling = _llama3(rope, trained)
            case "proportional":
                share = rope.number("partial_rotary_factor", 1.0)
                scaling = ProportionalRope(rope.number("factor", 1.0), int(share * head_dim // 2))
            case "yarn":
                beta = rope.number("llama_4_scaling_beta", 0.0, positive=False)
                scaling = _yarn(rope, trained, max_len, beta if scales_queries else 0.0)
            case _:
                scaling = _longrope(rope, trained, max_len, head_dim)
                max_len = _trained_only(rope, trained, max_len)
        return cls(theta, scaling, max_len)


def rope_section(config: ConfigFile) -> ConfigFile:
    """Return what the config says of positions, empty where it has no section for them."""
    older = "rope_scaling"
    return config.section(older if config.values.get(older) else "rope_parameters")


def _refuse_partial(rope: ConfigFile, config: ConfigFile) -> None:
    for where in (rope, config):
        if where.number("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedModel(
                f"{rope.path} rotates a part of each head, by partial_rotary_factor"
            )


def _llama3(rope: ConfigFile, trained: int) -> Llama3Rope:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if not low < high:
        raise ModelDamaged(f"{rope.path}: low_freq_factor is {low} but high_freq_factor is {high}")
    return Llama3Rope(rope.number("factor"), low, high, trained)


def _yarn(rope: ConfigFile, trained: int, max_len: int, query_beta: float) -> YarnRope:
    factor = rope.number("factor", max_len / trained)
    default = _magnitude(factor, 1.0)
    over, under = (rope.number(k, 0.0, positive=False) for k in ("mscale", "mscale_all_dim"))
    if over and under:
        default = _magnitude(factor, over) / _magnitude(factor, under)
    return YarnRope(
        factor,
        trained,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.number("attention_factor", default),
        truncate=rope.flag("truncate", True),
        query_beta=query_beta,
    )


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(rope: ConfigFile, trained: int, max_len: int, head_dim: int) -> LongRope:
    factors = rope.values.get("short_factor")
    is_list = isinstance(factors, list) and len(factors) == head_dim // 2
    if not is_list or not all(isinstance(f, int | float) and f > 0 for f in factors or ()):
        raise ModelDamaged(
            f"{rope.path}: short_factor must be {head_dim // 2} positive numbers, one for each "
            "frequency of a head"
        )
    factor = rope.number("factor", max_len / trained)
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    return LongRope(
        tuple(map(float, factors or ())),
        attention_factor=rope.number("attention_factor", default),
    )


def _trained_only(rope: ConfigFile, trained: int, max_len: int) -> int:
    if trained < max_len:
        logger.warning(
            "%s stretches its positions by longrope beyond %s tokens, which would change what is "
            "cached already: prompt and answer may take %s together",
            *(rope.path, trained, trained),
        )
    return min(trained, max_len)
