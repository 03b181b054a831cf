"""FastMixture: the experts of a layer as the fast step wants them, packed from the plain model's.

The expert that all rows go through is split into as many of the others' size as it holds: its
output is the sum of theirs.

Shapes: M rows, D hidden size, F size of an expert, P choices of a row.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from d2f_runtime.kernels.activation import quantise_rows
from d2f_runtime.kernels.expert_weights import ExpertWeights, pack_fp8, pack_nf4
from d2f_runtime.kernels.routing import Routes
from d2f_runtime.models.feed_forward import FeedForward
from d2f_runtime.models.mixture import Mixture
from d2f_runtime.quantization.nf4 import BLOCK, Nf4Weight
from d2f_runtime.quantization.stored import StoredWeight, dense, quantise, stored_weight

__all__ = ["FastMixture"]

Packed = tuple[Tensor, Tensor | None]
"""Values and scales of an expert; see `ExpertWeights`."""


class FastMixture:
    """The packed experts of a layer.

    Args:
        mixture: on its device; unchanged.
        quantization: of the experts: "fp8", "nf4", or anything else for `dtype`.
        dtype: the model's.
    """

    def __init__(self, mixture: Mixture, quantization: str, dtype: torch.dtype) -> None:
        router, self._rule = mixture.router, mixture.router.config
        self._router = router.weight.detach()
        self._bias = None if router.bias is None else router.bias.detach().float()
        experts = [expert for expert in mixture.experts if isinstance(expert, FeedForward)]
        shared = [] if mixture.shared is None else _pieces(mixture.shared, self._rule.ffn_size)
        self._num_always = len(shared)
        number = len(experts) + len(shared)

        def packed(weight: StoredWeight) -> Packed:
            return _packed(weight, quantization, dtype)

        def weights(*names: str) -> Iterator[Packed]:
            for expert in experts:
                found = (getattr(expert, name) for name in names)
                yield _joined([packed(stored_weight(linear)) for linear in found])
            for piece in shared:
                yield _joined([packed(piece[name]) for name in names])

        self._gate_up = ExpertWeights.stacked(weights("gate_proj", "up_proj"), number)
        self._down = ExpertWeights.stacked(weights("down_proj"), number)

    @property
    def num_bytes(self) -> int:
        """Memory that the experts take."""
        return self._gate_up.num_bytes + self._down.num_bytes

    def parts(
        self,
        rows: Tensor,
        visible: Tensor,
        *,
        route: Callable[..., Routes],
        through_experts: Callable[..., Tensor],
    ) -> Tensor:
        """Map [M, D] to [P, M, D], to be summed over P by the reader.

        Args:
            rows: of the step.
            visible: [M] int32, 0 for padding, whose parts are left as they are.
            route: a kernel or its reference.
            through_experts: the same.
        """
        routes = route(
            rows,
            self._router,
            self._bias,
            rule=self._rule,
            num_always=self._num_always,
            visible=visible,
        )
        return through_experts(rows, routes, self._gate_up, self._down)


def _packed(weight: StoredWeight, quantization: str, dtype: torch.dtype) -> Packed:
    if quantization == "fp8":
        rows = quantise_rows(dense(weight, dtype))
        assert rows.scale is not None
        return pack_fp8(rows.values, rows.scale)
    if quantization != "nf4" or weight.shape[1] % BLOCK:
        return dense(weight, dtype), None
    stored = quantise(weight, quantization) if isinstance(weight, Tensor) else weight
    if not isinstance(stored, Nf4Weight) or stored.block % BLOCK or not stored.by_rows:
        stored = quantise(dense(stored, dtype), quantization)
    assert isinstance(stored, Nf4Weight)
    return pack_nf4(stored.codes_by_row(), stored.scales_by_row())


def _joined(parts: list[Packed]) -> Packed:
    """Return an expert's gates and ups as one."""
    values, scales = zip(*parts, strict=True)
    held = [scale for scale in scales if scale is not None]
    return torch.cat(values), torch.cat(held) if held else None


def _pieces(shared: FeedForward, size: int) -> list[dict[str, Tensor]]:
    """Return the weights of experts of that size which together are the shared one."""
    names = ("gate_proj", "up_proj", "down_proj")
    held = {name: dense(stored_weight(getattr(shared, name)), torch.float32) for name in names}
    width = held["gate_proj"].shape[0]
    cuts = [range(first, min(first + size, width)) for first in range(0, width, size)]

    def piece(name: str, cut: range) -> Tensor:
        at, more = slice(cut.start, cut.stop), size - len(cut)
        if name == "down_proj":
            return F.pad(held[name][:, at], (0, more))
        return F.pad(held[name][at], (0, 0, 0, more))

    return [{name: piece(name, cut) for name in names} for cut in cuts]
