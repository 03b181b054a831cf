"""LoRA adapters in PEFT's format, merged into the weights while these are loaded.

A folder holds adapter_config.json and adapter_model.safetensors. Its tensors are the factors of
modules, base_model.model.{module}.lora_A.weight and lora_B.weight (lora_embedding_A and _B of an
embedding), and whole parameters that stand instead of the base's: trained biases, `modules_to_save`
and what PEFT stores beside the factors of an embedding or a head. The merged weight is
W + scale * B @ A in fp32, as PEFT's merge_and_unload computes it for fp32 weights. Variants that
need more than that are refused by name.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from d2f_runtime.models.adapter_config import module_scales, read_adapter_config, saved_modules
from d2f_runtime.models.config_file import ConfigFile
from d2f_runtime.models.shards import Shards
from d2f_stream.core.errors import ModelDamaged, UnsupportedModel

__all__ = ["Adapter"]

WEIGHTS_FILE: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."

_FACTOR: Final = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?:\.(?!weight$)[^.]+)?(?:\.weight)?"
)
_WHOLE: Final = re.compile(
    r"(?P<module>.+?)(?:\.base_layer|\.modules_to_save(?:\.[^.]+)?)?\.(?P<kind>weight|bias)"
)


@dataclass(frozen=True, slots=True)
class _Pair:
    down: str  # lora_A, [rank, in]
    up: str  # lora_B, [out, rank]
    scale: float
    turned: bool  # of an embedding: the weight is [in, out]


class Adapter:
    """A LoRA adapter that was checked against its base; its tensors are read when merged.

    Attributes:
        base: what it was made for, as its config says; for people.
        factored: the base's parameters to which it adds.
        replaced: those for which it holds others.
    """

    def __init__(
        self, shards: Shards, pairs: Mapping[str, _Pair], whole: Mapping[str, str], base: str
    ) -> None:
        self._shards = shards
        self._pairs = pairs
        self._whole = whole
        self.base = base
        self.factored = frozenset(pairs)
        self.replaced = frozenset(whole)

    @classmethod
    def open(
        cls,
        folder: Path,
        parameters: Mapping[str, tuple[int, ...]],
        *,
        beside: Collection[str] = (),
    ) -> "Adapter":
        """Read the config and the headers of an adapter for a base with these parameters.

        Args:
            folder: the adapter's.
            parameters: shapes of the base's, by the names that its checkpoint gives them; a
                "model." before these may be missing or too many.
            beside: tensors that must be there and are none of the base's.

        Raises:
            ModelNotFound: the folder or one of its files is missing.
            ModelDamaged: a file is truncated, or a tensor is missing or unknown.
            UnsupportedModel: it is no plain LoRA, or for another base.
        """
        config = read_adapter_config(folder)
        shards = Shards.open(folder, WEIGHTS_FILE)
        base = str(config.values.get("base_model_name_or_path") or "a base that it does not name")
        factors, whole = _sorted_out(shards, parameters, beside)
        _check_saved(config, shards, whole)
        ranks = {name: shards.headers[down].shape[:1] for name, (down, _, _) in factors.items()}
        scales = module_scales(config, ranks)
        pairs: dict[str, _Pair] = {}
        for module, (down, up, turned) in factors.items():
            name = _in_base(f"{module}.weight", parameters)
            shapes = shards.headers[down].shape, shards.headers[up].shape
            _check_base(shards, name, shapes, turned, parameters, base)
            pairs[name] = _Pair(down, up, scales[module], turned)
        for name, stored in whole.items():
            _check_shape(shards, name, shards.headers[stored].shape, parameters[name], base)
        return cls(shards, pairs, whole, base)

    @property
    def names(self) -> frozenset[str]:
        """The base's parameters that it changes."""
        return self.factored | self.replaced

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
        """Return a parameter as the adapter has it, fp32; unchanged where it has nothing of it.

        Args:
            name: of the parameter, as the checkpoint gives it.
            weight: the base's, on the device where the sum is to be made.
        """
        pair, stored = self._pairs.get(name), self._whole.get(name)
        if stored is not None:
            ((_, held),) = self._shards.tensors([stored])
            weight = held.to(weight.device)
        elif pair is None:
            return weight
        merged = weight.to(torch.float32, copy=True)
        if pair is None:
            return merged
        factors = {
            key: tensor.to(weight.device).float()
            for key, tensor in self._shards.tensors((pair.down, pair.up))
        }
        down, up = factors[pair.down], factors[pair.up]
        if pair.turned:
            down, up = up.T, down.T
        return merged.addmm_(up, down, alpha=pair.scale)


def _in_base(name: str, parameters: Mapping[str, tuple[int, ...]]) -> str:
    """Return what the base calls a parameter, be it whole or the model inside a causal LM."""
    names = (name, f"model.{name}", name.removeprefix("model."), name.removeprefix("encoder."))
    return next((n for n in names if n in parameters), name)


def _sorted_out(
    shards: Shards, parameters: Mapping[str, tuple[int, ...]], beside: Collection[str]
) -> tuple[dict[str, tuple[str, str, bool]], dict[str, str]]:
    """Return the two factors of each adapted module, and the tensors of whole parameters by these.

    The last of the factors' three says whether they are an embedding's.
    """
    sides: dict[str, dict[str, str]] = {}
    turned: dict[str, bool] = {}
    whole: dict[str, str] = {}
    if lacking := set(beside) - set(shards.headers):
        raise ModelDamaged(f"{shards.path} lacks {min(lacking)}")
    for name in (name for name in shards.headers if name not in beside):
        short = name.removeprefix(PREFIX)
        if match := _FACTOR.fullmatch(short):
            found = sides.setdefault(match["module"], {})
            if match["side"] in found:
                raise ModelDamaged(f"{shards.path} has {name} for two adapters; one is expected")
            found[match["side"]] = name
            turned[match["module"]] = match["kind"] is not None
            continue
        match = _WHOLE.fullmatch(short)
        of = "" if match is None else _in_base(f"{match['module']}.{match['kind']}", parameters)
        if of not in parameters:
            raise UnsupportedModel(
                f"{shards.path} has the tensor {name}, which is no LoRA factor and no parameter of "
                "this model"
            )
        if of in whole:
            raise ModelDamaged(f"{shards.path} has both {whole[of]} and {name}; one is expected")
        whole[of] = name
    for module, found in sides.items():
        if missing := {"A", "B"} - set(found):
            raise ModelDamaged(f"{shards.path} lacks lora_{min(missing)} of {module}")
    if not sides and not whole:
        raise ModelDamaged(f"{shards.path} adapts nothing")
    return {name: (s["A"], s["B"], turned[name]) for name, s in sides.items()}, whole


def _check_saved(config: ConfigFile, shards: Shards, whole: Mapping[str, str]) -> None:
    """Refuse an adapter that lacks a module which it says to hold whole."""
    for module in saved_modules(config):
        if not any(f".{name}".endswith((f".{module}.weight", f".{module}.bias")) for name in whole):
            raise ModelDamaged(f"{shards.path} lacks {module}, one of modules_to_save")


def _check_base(
    shards: Shards,
    name: str,
    factors: tuple[tuple[int, ...], tuple[int, ...]],
    turned: bool,
    parameters: Mapping[str, tuple[int, ...]],
    base: str,
) -> None:
    down, up = factors
    if name not in parameters:
        raise UnsupportedModel(
            f"{shards.path} is an adapter for another model, made for {base}: it adapts {name}, "
            "which this one does not have"
        )
    if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
        raise ModelDamaged(f"{shards.path}: the factors of {name} have shapes {up} and {down}")
    shape = (down[1], up[0]) if turned else (up[0], down[1])
    _check_shape(shards, name, shape, parameters[name], base)


def _check_shape(
    shards: Shards, name: str, found: tuple[int, ...], wanted: tuple[int, ...], base: str
) -> None:
    if found != wanted:
        raise UnsupportedModel(
            f"{shards.path} is an adapter for another model, made for {base}: it adapts {name} of "
            f"shape {found}, which is {wanted} here"
        )
