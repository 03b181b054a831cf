"""From a GGUF file's metadata to the config that the same model is published with.

The sizes that the metadata gives are held against the tensors at once: what is built from them
later is then no larger than the file. Keys are those of gguf-py's constants.py and of llama.cpp's
llama-model.cpp; those that ask for mathematics that the transformer does not have are refused by
name.
"""

import math
import re
import struct
from collections.abc import Mapping
from typing import Any, Final

from d2f_runtime.gguf.file import GgufFile
from d2f_runtime.models.config_file import ConfigFile
from d2f_stream.core.errors import ModelDamaged, UnsupportedModel

__all__ = ["ARCHITECTURES", "gguf_config", "has_biases"]

ARCHITECTURES: Final = ("llama", "qwen2", "qwen3")
"""Of general.architecture; each is the model_type of the same name."""

EMBEDDING: Final = "token_embd.weight"
HEAD: Final = "output.weight"
STRETCH: Final = "rope_freqs.weight"  # llama3's scaling, as the number that divides each frequency
LAYER: Final = re.compile(r"blk\.(\d+)\.")

ENDS: Final = ("eos_token_id", "eot_token_id", "eom_token_id")
END_TEXTS: Final = frozenset(
    {
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<|end|>",
        "</s>",
    }
)
"""Control tokens that end an answer whatever the ids above say, as in llama.cpp."""

CONTROL: Final = 3  # of tokenizer.ggml.token_type

_ONLY: Final[Mapping[str, tuple[object, ...]]] = {
    "attention.causal": (None, True),
    "attention.clamp_kqv": (None, 0.0),
    "attention.max_alibi_bias": (None, 0.0),
    "attention.scale": (None,),
    "attention.sliding_window": (None, 0),
    "embedding_scale": (None, 1.0),
    "expert_count": (None, 0),
    "logit_scale": (None, 1.0),
    "residual_scale": (None, 1.0),
    "rope.scale_linear": (None, 1.0),
    "rope.scaling.type": (None, "none"),
    "tensor_data_layout": (None, "Meta AI original pth"),
    "use_parallel_residual": (None, False),
}
"""The values of options that the transformer is written for; None is an absent key."""


def gguf_config(file: GgufFile) -> ConfigFile:
    """Return what config.json would say of the model, under the names of its `model_type`.

    Raises:
        UnsupportedModel: an architecture or an option that this build does not run.
        ModelDamaged: a key is missing, of the wrong kind, or contradicts the tensors.
    """
    said = ConfigFile(file.path, file.metadata)
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedModel(
            f"{file.path} is of the architecture {architecture!r}, but this build runs GGUF files "
            f"of {known}"
        )
    prefix = f"{architecture}."
    for key, allowed in _ONLY.items():
        if (value := file.metadata.get(prefix + key)) not in allowed:
            raise UnsupportedModel(
                f"{file.path}: {prefix}{key} is {value!r}, which this build does not run"
            )
    hidden_size = said.integer(prefix + "embedding_length")
    num_heads = _same(said, prefix + "attention.head_count")
    head_dim = said.integer(prefix + "attention.key_length", max(hidden_size // num_heads, 1))
    values: dict[str, Any] = {
        "model_type": architecture,
        "vocab_size": _rows(file, EMBEDDING),
        "hidden_size": hidden_size,
        "num_hidden_layers": said.integer(prefix + "block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _same(said, prefix + "attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "intermediate_size": _same(said, prefix + "feed_forward_length"),
        "max_position_embeddings": said.integer(prefix + "context_length"),
        "rms_norm_eps": said.number(prefix + "attention.layer_norm_rms_epsilon"),
        "rope_theta": said.number(prefix + "rope.freq_base", 10_000.0),
        "tie_word_embeddings": HEAD not in file.tensors,
        "eos_token_id": _end_ids(said),
    }
    for key in ("attention.value_length", "rope.dimension_count"):
        if (value := said.integer(prefix + key, head_dim)) != head_dim:
            raise UnsupportedModel(
                f"{file.path}: {prefix}{key} is {value} where a head has {head_dim}; this build "
                "rotates and weighs whole heads only"
            )
    if head_dim % 2:
        raise ModelDamaged(f"{file.path}: a head has {head_dim} numbers, which make no pairs")
    _check_sizes(file, values)
    if STRETCH in file.tensors:
        values["rope_scaling"] = _stretch(file, values, said)
    return ConfigFile(file.path, values)


def has_biases(file: GgufFile) -> bool:
    """Whether q, k and v have biases, which no key says."""
    return "blk.0.attn_q.bias" in file.tensors


def _same(said: ConfigFile, key: str, default: int | None = None) -> int:
    """Return a size that may be given once, or by layer."""
    value = said.values.get(key)
    if isinstance(value, tuple) and value:
        if len(set(value)) > 1:
            raise UnsupportedModel(
                f"{said.path}: {key} differs from layer to layer, which this build does not run"
            )
        said = ConfigFile(said.path, {key: value[0]})
    return said.integer(key, default)


def _end_ids(said: ConfigFile) -> list[int]:
    prefix = "tokenizer.ggml."
    found = {token for key in ENDS for token in said.ids(prefix + key)}
    tokens, types = (said.values.get(prefix + key) for key in ("tokens", "token_type"))
    if isinstance(tokens, tuple) and isinstance(types, tuple):
        for index, (text, kind) in enumerate(zip(tokens, types, strict=False)):
            if kind == CONTROL and text in END_TEXTS:
                found.add(index)
    if not found:
        raise ModelDamaged(
            f"nothing in {said.path} says which token ends an answer: it has no "
            f"{prefix}eos_token_id"
        )
    return sorted(found)


def _rows(file: GgufFile, name: str) -> int:
    if name not in file.tensors:
        raise ModelDamaged(f"{file.path} lacks the tensor {name}; is it a whole model?")
    return file.tensors[name].shape[0]


def _check_sizes(file: GgufFile, values: Mapping[str, Any]) -> None:
    """Hold the metadata against the first layer's tensors and the number of layers."""
    hidden_size, head_dim = values["hidden_size"], values["head_dim"]
    shapes = {
        EMBEDDING: (values["vocab_size"], hidden_size),
        "blk.0.attn_q.weight": (values["num_attention_heads"] * head_dim, hidden_size),
        "blk.0.attn_k.weight": (values["num_key_value_heads"] * head_dim, hidden_size),
        "blk.0.ffn_up.weight": (values["intermediate_size"], hidden_size),
    }
    for name, shape in shapes.items():
        _rows(file, name)
        if (found := file.tensors[name].shape) != shape:
            raise ModelDamaged(
                f"{file.path}: {name} has shape {found} but the metadata asks for {shape}"
            )
    if values["num_attention_heads"] % values["num_key_value_heads"]:
        raise ModelDamaged(
            f"{file.path} has {values['num_attention_heads']} heads, which "
            f"{values['num_key_value_heads']} heads of keys and values do not divide"
        )
    layers = {match[1] for name in file.tensors if (match := LAYER.match(name))}
    if len(layers) != values["num_hidden_layers"]:
        raise ModelDamaged(
            f"{file.path} holds {len(layers)} layers but its metadata says "
            f"{values['num_hidden_layers']}"
        )


def _stretch(
    file: GgufFile, values: Mapping[str, Any], said: ConfigFile
) -> Mapping[str, object] | None:
    """Return the scaling of llama3 that gives the file's divisors; None where they are all one.

    The file holds its outcome alone, so the numbers it was published with are tried.
    """
    tensor = file.tensors[STRETCH]
    half = values["head_dim"] // 2
    if tensor.type.name != "F32" or tensor.shape != (half,):
        raise UnsupportedModel(
            f"{file.path}: {STRETCH} is {tensor.type.name} of shape {tensor.shape}, but must be "
            f"F32 of shape ({half},)"
        )
    divisors: tuple[float, ...] = struct.unpack(f"<{half}f", file.read(tensor))
    factor = max(divisors)
    if set(divisors) == {1.0}:
        return None
    trained = said.ids(f"{values['model_type']}.rope.scaling.original_context_length")
    low, high = 1.0, 4.0
    for trained_len in (*trained, 8192):
        turns = [
            trained_len * values["rope_theta"] ** (-index / half) / (2 * math.pi)
            for index in range(half)
        ]
        kept = [min(max((turn - low) / (high - low), 0.0), 1.0) for turn in turns]
        made = [1 / (share + (1 - share) / factor) for share in kept]
        if all(math.isclose(x, y, rel_tol=1e-4) for x, y in zip(made, divisors, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": trained_len,
            }
    raise UnsupportedModel(
        f"{file.path}: {STRETCH} stretches the rotary positions in a way that is not llama3's, "
        "which is all that this build knows"
    )
