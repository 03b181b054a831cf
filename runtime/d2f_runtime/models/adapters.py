"""LoRA adapters in PEFT's format, merged into the weights while these are loaded.

A folder holds adapter_config.json and adapter_model.safetensors, whose tensors are called
base_model.model.{module}.lora_A.weight, with the module's name in the base model. The merged weight
is W + scale * B @ A in fp32, as PEFT's merge_and_unload computes it for fp32 weights. Variants that
need more than that are refused by name.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from d2f_runtime.models.config_file import ConfigFile
from d2f_runtime.models.draft_facts import ADAPTER_CONFIG_FILE
from d2f_runtime.models.shards import Shards
from d2f_stream.core.errors import ModelDamaged, ModelNotFound, UnsupportedModel

__all__ = ["Adapter"]

WEIGHTS_FILE: Final = "adapter_model.safetensors"

_KEY: Final = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
)
_ONLY: Final[Mapping[str, tuple[object, ...]]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None, {}),
    "kasa_config": (None, {}),
    "layer_replication": (None, []),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "monteclora_config": (None, {}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "velora_config": (None, {}),
}
"""The values with which an adapter is plain LoRA; others change the base or the forward."""


@dataclass(frozen=True, slots=True)
class _Pair:
    down: str  # lora_A, [rank, in]
    up: str  # lora_B, [out, rank]
    scale: float


class Adapter:
    """A LoRA adapter that was checked against its base; its tensors are read when merged.

    Attributes:
        base: what it was made for, as its config says; for people.
    """

    def __init__(self, shards: Shards, pairs: Mapping[str, _Pair], base: str) -> None:
        self._shards = shards
        self._pairs = pairs
        self.base = base

    @classmethod
    def open(
        cls,
        folder: Path,
        weights: Mapping[str, tuple[int, ...]],
        *,
        beside: Collection[str] = (),
    ) -> "Adapter":
        """Read the config and the headers of an adapter for a base with these weights.

        Args:
            folder: the adapter's.
            weights: shapes of the base's weights, by the names that its checkpoint gives them; a
                "model." before these may be missing or too many.
            beside: tensors that must be there and are no factors.

        Raises:
            ModelNotFound: the folder or one of its files is missing.
            ModelDamaged: a file is truncated, or a tensor is missing or unknown.
            UnsupportedModel: it is no plain LoRA, or for another base.
        """
        config = ConfigFile.read(folder / ADAPTER_CONFIG_FILE)
        if config is None:
            raise ModelNotFound(
                f"no {ADAPTER_CONFIG_FILE} in {folder}; is it a LoRA adapter's folder?"
            )
        for key, allowed in _ONLY.items():
            if (value := config.values.get(key)) not in allowed:
                raise UnsupportedModel(
                    f"{config.path} asks for {key} {value!r}, but only plain LoRA can be merged"
                )
        shards = Shards.open(folder, WEIGHTS_FILE)
        base = str(config.values.get("base_model_name_or_path") or "a base that it does not name")
        pairs: dict[str, _Pair] = {}
        for module, sides in _modules(shards, beside).items():
            rank = shards.headers[sides["A"]].shape[0]
            _check_rank(config, module, rank)
            name = _in_base(f"{module}.weight", weights)
            _check_base(shards, sides, name, weights, base)
            pairs[name] = _Pair(sides["A"], sides["B"], _scale(config, module))
        return cls(shards, pairs, base)

    @property
    def names(self) -> frozenset[str]:
        """The base's weights that it changes."""
        return frozenset(self._pairs)

    def factors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Read [rank, in] and [out, rank], the scale in the latter, fp32, by the weights' names."""
        names = {key: name for name, pair in self._pairs.items() for key in (pair.down, pair.up)}
        halves: dict[str, Tensor] = {}
        for key, tensor in self._shards.tensors(names):
            name, pair = names[key], self._pairs[names[key]]
            other = halves.pop(name, None)
            if other is None:
                halves[name] = tensor.float()
            else:
                down, up = (tensor.float(), other) if key == pair.down else (other, tensor.float())
                yield name, down, up * pair.scale

    def beside(self, name: str) -> Tensor:
        """Read a tensor that is no factor."""
        ((_, tensor),) = self._shards.tensors([name])
        return tensor

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight with the adapter's share of it, fp32; unchanged where it has none.

        Args:
            name: of the weight, as the checkpoint gives it.
            weight: [out, in] on the device where the sum is to be made.
        """
        pair = self._pairs.get(name)
        if pair is None:
            return weight
        factors = {
            key: tensor.to(weight.device).float()
            for key, tensor in self._shards.tensors((pair.down, pair.up))
        }
        merged = weight.to(torch.float32, copy=True)
        return merged.addmm_(factors[pair.up], factors[pair.down], alpha=pair.scale)


def _in_base(name: str, weights: Mapping[str, tuple[int, ...]]) -> str:
    """Return what the base calls a weight, be it whole or the model inside a causal LM."""
    names = (name, f"model.{name}", name.removeprefix("model."))
    return next((n for n in names if n in weights), name)


def _modules(shards: Shards, beside: Collection[str]) -> dict[str, dict[str, str]]:
    """Return the names of the two factors for each adapted module."""
    modules: dict[str, dict[str, str]] = {}
    if missing := set(beside) - set(shards.headers):
        raise ModelDamaged(f"{shards.path} lacks {min(missing)}")
    for name in (name for name in shards.headers if name not in beside):
        match = _KEY.fullmatch(name)
        if match is None:
            raise UnsupportedModel(f"{shards.path} has the tensor {name}, which is no LoRA factor")
        sides = modules.setdefault(match["module"], {})
        if match["side"] in sides:
            raise ModelDamaged(f"{shards.path} has {name} for two adapters; one is expected")
        sides[match["side"]] = name
    for module, sides in modules.items():
        if missing := {"A", "B"} - set(sides):
            raise ModelDamaged(f"{shards.path} lacks lora_{min(missing)} of {module}")
    if not modules:
        raise ModelDamaged(f"{shards.path} adapts nothing")
    return modules


def _check_base(
    shards: Shards,
    sides: Mapping[str, str],
    name: str,
    weights: Mapping[str, tuple[int, ...]],
    base: str,
) -> None:
    down, up = shards.headers[sides["A"]].shape, shards.headers[sides["B"]].shape
    wrong = f"{shards.path} is an adapter for another model, made for {base}: it"
    if name not in weights:
        raise UnsupportedModel(f"{wrong} adapts {name}, which this one does not have")
    if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
        raise ModelDamaged(f"{shards.path}: the factors of {name} have shapes {up} and {down}")
    if (up[0], down[1]) != weights[name]:
        raise UnsupportedModel(
            f"{wrong} adapts {name} of shape {(up[0], down[1])}, which is {weights[name]} here"
        )


def _check_rank(config: ConfigFile, module: str, rank: int) -> None:
    expected = _by_pattern(config, "rank_pattern", module, config.number("r"))
    if rank != expected:
        raise ModelDamaged(
            f"{config.path} gives {module} the rank {expected:g}, but its factors have {rank}"
        )


def _scale(config: ConfigFile, module: str) -> float:
    rank = _by_pattern(config, "rank_pattern", module, config.number("r"))
    alpha = _by_pattern(config, "alpha_pattern", module, config.number("lora_alpha"))
    divisor: float = rank**0.5 if config.flag("use_rslora", False) else rank
    return alpha / divisor


def _by_pattern(config: ConfigFile, key: str, module: str, default: float) -> float:
    """Return the value of the first pattern that the module's name ends with, as PEFT does."""
    patterns = config.section(key)
    for pattern in patterns.values:
        if re.match(rf"(.*\.)?({pattern})$", module):
            return patterns.number(pattern)
    return default
