"""From what a published config says of its experts to a `MixtureConfig`.

LLaDA2's keys and defaults are those of its modeling file (ZHZisZZ/dllm, ca17675, pipelines/llada2),
SDAR-MoE's those of transformers' Qwen3-MoE, whose layout it has.
"""

from collections.abc import Mapping
from typing import Final

from d2f_runtime.models.config_file import ConfigFile
from d2f_runtime.models.mixture_config import MixtureConfig
from d2f_runtime.models.published_rope import rope_section
from d2f_stream.core.errors import ModelDamaged, UnsupportedModel

__all__ = ["llada2_mixture", "qwen3_mixture", "rotary_dim"]

PARTIAL: Final = "partial_rotary_factor"

_ONLY_LLADA2: Final[Mapping[str, tuple[object, ...]]] = {
    "norm_head": (None, False),
    "router_dtype": (None, "fp32"),
    "score_function": (None, "sigmoid"),
    "use_bias": (None, False),
    "use_qkv_bias": (None, False),
}
"""The values of options that the transformer is written for; None is an absent key."""


def llada2_mixture(config: ConfigFile) -> MixtureConfig:
    """Read LLaDA2's experts; `norm_topk_prob` has no effect there either.

    Raises:
        UnsupportedModel: an option that this build does not know.
        ModelDamaged: a key is missing or of the wrong kind, or no router chooses so.
    """
    for key, allowed in _ONLY_LLADA2.items():
        if (value := config.values.get(key)) not in allowed:
            raise UnsupportedModel(
                f"{config.path} asks for {key} {value!r:.100}, which this build does not run"
            )
    size = config.integer("moe_intermediate_size")
    return MixtureConfig(
        num_experts=config.integer("num_experts"),
        num_chosen=config.integer("num_experts_per_tok"),
        ffn_size=size,
        scoring="sigmoid",
        has_bias=config.flag("moe_router_enable_expert_bias", True),
        num_groups=config.integer("n_group", 8),
        num_kept_groups=config.integer("topk_group", 4),
        normalised=config.integer("num_experts_per_tok") > 1,
        scale=config.number("routed_scaling_factor", 2.5),
        shared_size=size * _count(config, "num_shared_experts", 1),
        dense_layers=tuple(range(_count(config, "first_k_dense_replace", 1))),
    )


def qwen3_mixture(config: ConfigFile) -> MixtureConfig:
    """Read SDAR-MoE's experts.

    Raises:
        ModelDamaged: a key is missing or of the wrong kind, or no router chooses so.
    """
    step = config.integer("decoder_sparse_step", 1)
    dense = config.values.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise ModelDamaged(
            f"{config.path}: mlp_only_layers is {dense!r:.100} but must be a list of layers"
        )
    number = config.integer("num_hidden_layers")
    return MixtureConfig(
        num_experts=config.integer("num_experts"),
        num_chosen=config.integer("num_experts_per_tok"),
        ffn_size=config.integer("moe_intermediate_size"),
        scoring="softmax",
        normalised=config.flag("norm_topk_prob", True),
        dense_layers=tuple(n for n in range(number) if n in dense or (n + 1) % step),
    )


def rotary_dim(config: ConfigFile, head_dim: int) -> int:
    """Return how many dimensions of a head LLaDA2 turns; 0 is all.

    Raises:
        ModelDamaged: more than there are, or an odd number.
    """
    source = config if PARTIAL in config else rope_section(config)  # where transformers 5 has it
    turning = int(head_dim * source.number(PARTIAL, 0.5))
    if PARTIAL not in source:  # it wins where both are there
        turning = config.integer("rotary_dim", turning)
    if turning % 2 or not 0 < turning <= head_dim:
        raise ModelDamaged(
            f"{config.path}: {turning} dimensions of a head of {head_dim} turn (rotary_dim, "
            "partial_rotary_factor), but that must be an even number of them"
        )
    return 0 if turning == head_dim else turning


def _count(config: ConfigFile, key: str, default: int) -> int:
    """Return a number that may be 0."""
    return 0 if config.values.get(key) == 0 else config.integer(key, default)
