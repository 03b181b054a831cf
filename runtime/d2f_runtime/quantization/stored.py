"""Weights as a checkpoint may hold them: dense, NF4 or int8; joined as a step wants them.

What a format is lies in `nf4` and `int8`, how a packed weight is multiplied in `linear`.
"""

from collections.abc import Callable, Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2f_runtime.quantization.int8 import Int8Weight, quantise_int8
from d2f_runtime.quantization.nf4 import Nf4Weight, quantise_nf4

__all__ = [
    "LOW_BIT",
    "QuantizedLinear",
    "QuantizedWeight",
    "StoredWeight",
    "dense",
    "dequantise_layers",
    "join_outputs",
    "quantise",
    "stored_weight",
]

QuantizedWeight = Nf4Weight | Int8Weight
StoredWeight = Tensor | QuantizedWeight

LOW_BIT: Final = ("nf4", "int8")
EXPERTS: Final = ".experts."


class QuantizedLinear(nn.Module):
    """A linear layer over a quantised weight, which every call dequantises: right, and slow.

    Stands in a `Transformer` until its weights are packed for the fast step or made dense.
    """

    def __init__(self, stored: QuantizedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.stored = stored
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., K] to [..., N]."""
        return F.linear(x, self.stored.dequantised(x.dtype), self.bias)

    def to_dense(self, dtype: torch.dtype) -> nn.Linear:
        """Return the same layer with its weight in `dtype`."""
        outputs, features = self.stored.shape
        with torch.device("meta"):
            linear = nn.Linear(features, outputs, bias=False)
        linear.weight = nn.Parameter(self.stored.dequantised(dtype), requires_grad=False)
        linear.register_parameter("bias", self.bias)
        return linear


def quantise(weight: Tensor, quantization: str) -> QuantizedWeight:
    """Quantise a dense weight to one of `LOW_BIT`."""
    assert quantization in LOW_BIT, quantization
    return quantise_nf4(weight) if quantization == "nf4" else quantise_int8(weight)


def dequantise_layers(layers: nn.Module, quantization: str, dtype: torch.dtype) -> None:
    """Give projections the dense weights that a quantisation leaves of them, in place, one by one.

    Experts stay quantised: of these, a step reads only some, and all would take too much memory.

    Args:
        layers: of a model; projections are named as in `Transformer`.
        quantization: of those that are dense yet, one of `LOW_BIT`.
        dtype: of the result.
    """
    for name, module in list(layers.named_modules()):
        if not name.endswith("_proj"):
            continue
        weight = stored_weight(module)
        if isinstance(weight, Tensor):
            weight = quantise(weight, quantization)
        linear = QuantizedLinear(weight, getattr(module, "bias", None))
        parent, _, child = name.rpartition(".")
        held = linear if EXPERTS in name else linear.to_dense(dtype)
        setattr(layers.get_submodule(parent), child, held)


def stored_weight(linear: nn.Module) -> StoredWeight:
    """Return the weight of a linear layer as it is held."""
    if isinstance(linear, QuantizedLinear):
        return linear.stored
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def join_outputs(
    weights: Sequence[StoredWeight], join: Callable[..., Tensor], dtype: torch.dtype
) -> StoredWeight:
    """Return several weights [N, K] as one, kept quantised where all are so in the same way.

    Args:
        weights: of equal K.
        join: takes tensors [N, ...] and orders their rows, whatever these hold.
        dtype: of the result where they differ.
    """
    joined: QuantizedWeight | None = None
    if all(isinstance(weight, Nf4Weight) for weight in weights):
        joined = Nf4Weight.joined([w for w in weights if isinstance(w, Nf4Weight)], join)
    elif all(isinstance(weight, Int8Weight) for weight in weights):
        joined = Int8Weight.joined([w for w in weights if isinstance(w, Int8Weight)], join)
    return join(*[dense(weight, dtype) for weight in weights]) if joined is None else joined


def dense(weight: StoredWeight, dtype: torch.dtype) -> Tensor:
    """Return a weight in `dtype`, unless it is dense already: then as it is."""
    return weight if isinstance(weight, Tensor) else weight.dequantised(dtype)
