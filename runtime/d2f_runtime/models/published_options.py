"""Options of published configs that the transformer is not written for, refused by name."""

from collections.abc import Mapping
from typing import Final

from d2f_runtime.models.config_file import ConfigFile
from d2f_runtime.models.families import Family
from d2f_stream.core.errors import ModelDamaged, UnsupportedModel

__all__ = ["refuse_variants"]

WINDOWLESS: Final = (
    "a2d",
    "llada",
    "llada2",
    "llama",
    "nemotron",
    "stable-diffcoder",
)  # labels of families whose classes know no windows, or mask all layers alike
WITH_BIASES: Final = ("Dream", "Fast_dLLM_Qwen", "a2d-qwen2", "qwen2")  # on q, k and v
PARADIGMS: Final = ("bidirectional", "block_diff")  # of Nemotron-Labs-Diffusion
DEFAULT_WINDOW: Final = 4096  # of transformers' Qwen2Config and Qwen3Config, as the next one
DEFAULT_WINDOW_LAYERS: Final = 28

_ONLY: Final[Mapping[str, tuple[object, ...]]] = {
    # of all
    "quantization_config": (None,),
    "hidden_act": (None, "silu", "swish"),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "use_mrope": (None, False),
}
"""The values of options that the transformer is written for; None is an absent key."""

_ONLY_LLADA: Final[Mapping[str, tuple[object, ...]]] = {
    "activation_type": ("silu",),
    "alibi": (None, False),
    "attention_layer_norm": (None, False),
    "bias_for_layer_norm": (None, False),
    "block_group_size": (None, 1),
    "block_type": ("llama",),
    "include_bias": (None, False),
    "input_emb_norm": (None, False),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (None, True),
    "quantization_config": (None,),
    "rope": (True,),
    "scale_logits": (None, False),
}
"""The same of LLaDA, whose classes are a GPT-2's where the config says nothing."""


def refuse_variants(config: ConfigFile, family: Family) -> None:
    """Refuse a config.json that asks for what is not done.

    Raises:
        UnsupportedModel: for the first such option.
        ModelDamaged: a key is of the wrong kind.
    """
    values = config.values
    is_llada = values["model_type"] == "llada"
    for key, allowed in (_ONLY_LLADA if is_llada else _ONLY).items():
        value = values.get(key)
        # Qwen2's and Dream's biases on q, k and v go without saying
        if key == "attention_bias" and values["model_type"] in WITH_BIASES:
            continue
        if key == "quantization_config" and _is_bitsandbytes(value):
            continue  # the tensors say the rest
        if value not in allowed:
            shown = "a quantization" if key == "quantization_config" else f"{key} {value!r:.100}"
            raise UnsupportedModel(f"{config.path} asks for {shown}, which this build does not run")
    _refuse_windows(config, family)
    if family.label == "nemotron":
        _refuse_paradigms(config)
    if values["model_type"] == "Dream" and "block_size" in config:
        raise UnsupportedModel(
            f"{config.path} is a Dream with a block_size of its own, a block diffusion model that "
            "this build does not run"
        )


def _refuse_paradigms(config: ConfigFile) -> None:
    """Refuse a Nemotron that was not trained to denoise; how it was else has no effect here."""
    paradigm = config.values.get("dlm_paradigm", PARADIGMS[0])
    if paradigm not in PARADIGMS:
        raise UnsupportedModel(
            f"{config.path} has the dlm_paradigm {paradigm!r:.100}, but this build runs "
            f"{' and '.join(PARADIGMS)}"
        )
    if "sliding_window" in config:
        raise UnsupportedModel(
            f"{config.path} asks for sliding_window {config.values['sliding_window']!r:.100}, "
            "which this build does not run"
        )


def _refuse_windows(config: ConfigFile, family: Family) -> None:
    """Refuse layers that see a part of the canvas only, by what transformers makes of the keys."""
    values = config.values
    if family.label in WINDOWLESS:
        return
    number = config.integer("num_hidden_layers")
    kinds = values.get("layer_types")
    window: int | None = None
    if config.flag("use_sliding_window", False) and "sliding_window" not in config.nulls:
        window = config.integer("sliding_window", DEFAULT_WINDOW)
    if kinds is None:
        first = values.get("max_window_layers", DEFAULT_WINDOW_LAYERS)
        if not isinstance(first, int):
            raise ModelDamaged(
                f"{config.path}: max_window_layers is {first!r:.100}, not an integer"
            )
        has_windows = window is not None and first < number
        kinds = ["sliding_attention"] if has_windows else []
    elif not isinstance(kinds, list) or len(kinds) != number:
        raise ModelDamaged(f"{config.path}: layer_types must name each of the {number} layers")
    others = [kind for kind in kinds if kind != "full_attention"]
    wide_enough = window is not None and window >= config.integer("max_position_embeddings")
    if any(kind != "sliding_attention" for kind in others) or (others and not wide_enough):
        raise UnsupportedModel(
            f"{config.path} asks for layers of {others[0]!r:.100} (sliding_window {window}), "
            "but this build runs full_attention only"
        )


def _is_bitsandbytes(quantization: object) -> bool:
    return isinstance(quantization, dict) and quantization.get("quant_method") == "bitsandbytes"
