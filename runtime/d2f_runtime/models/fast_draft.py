"""FastDraft: a draft adapter's factors as the fast step multiplies them, by merged product.

Steps of few rows multiply weight and factors in one launch (`kernels.drafted`). In others every row
goes through the narrow products, and what is no draft is multiplied by zero between them: shapes
stay static, so that CUDA graphs hold them. A clean row's outputs keep their bits.

Shapes: M rows, K inputs, N outputs, R ranks of the products that are merged.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from d2f_runtime.kernels.activation import Activation
from d2f_runtime.kernels.drafted import TiledFactors, cut_for, outputs_of_tile
from d2f_runtime.kernels.language import is_hopper
from d2f_runtime.models.draft_adapter import LayerDraft
from d2f_runtime.quantization.linear import DenseLinear, PackedLinear

__all__ = ["DraftRows", "FastDraft", "FastLayerDraft"]


class DraftRows(NamedTuple):
    """Which rows of a step are drafts.

    Attributes:
        flags: [M] int32, 1 for draft rows and 0 for others.
        shares: [M, 1] the same in the model's dtype.
        product: `kernels.drafted.drafted_product`, or its reference.
    """

    flags: Tensor
    shares: Tensor
    product: Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class FastDraft:
    """The factors of one merged product.

    Attributes:
        down: [R, K].
        up: [N, R], outputs ordered as the product's; a block for each of what is merged.
        tiled: the same as one launch takes them; None where none can.
    """

    down: Tensor
    up: Tensor
    tiled: TiledFactors | None

    @classmethod
    def of(cls, down: Tensor, up: Tensor) -> "FastDraft":
        """Keep factors [R, K] and [N, R] as the device takes them."""
        tiled = None
        if down.device.type == "cpu" or (is_hopper(down.device) and down.element_size() == 2):
            tiled = TiledFactors.of(down, up, outputs_of_tile(len(up)))
        return cls(down, up, tiled)

    def multiplied(self, linear: PackedLinear, x: Activation, drafts: DraftRows) -> Tensor:
        """Return [M, N] a product of all rows, with their share for drafts."""
        found = self._in_one(linear, x, drafts, may_split=False)
        if found is not None:
            return found[0]
        out = linear(x)
        self._add(x, drafts.shares, out)
        return out

    def parts(self, linear: PackedLinear, x: Activation, drafts: DraftRows) -> Tensor:
        """Return the same as [S, M, N], to be summed over S by the reader."""
        found = self._in_one(linear, x, drafts, may_split=True)
        if found is not None:
            return found
        parts = linear.parts(x)
        self._add(x, drafts.shares, parts[0])
        return parts

    def _in_one(
        self, linear: PackedLinear, x: Activation, drafts: DraftRows, *, may_split: bool
    ) -> Tensor | None:
        """Return [S, M, N] by one launch; None where there is none, or it is not the better way."""
        if self.tiled is None or not isinstance(linear, DenseLinear):
            return None
        rows, features = x.values.shape
        cut = cut_for(rows, features, self.tiled.outputs, may_split=may_split)
        if cut is None:
            return None
        return drafts.product(x.values, linear.weight, self.tiled, drafts.flags, cut=cut)

    def _add(self, x: Activation, drafts: Tensor, out: Tensor) -> None:
        values = x.values if x.scale is None else x.dequantised().to(self.down.dtype)
        out.addmm_((values @ self.down.T).mul_(drafts), self.up.T)


@dataclass(frozen=True, slots=True)
class FastLayerDraft:
    """The factors of a layer's merged products; None where nothing of one is adapted."""

    qkv: FastDraft | None
    out: FastDraft | None
    gate_up: FastDraft | None
    down: FastDraft | None

    @classmethod
    def of(
        cls,
        layer: LayerDraft,
        num_outputs: dict[str, int],
        join_heads: Callable[[Tensor], Tensor],
        join_gates: Callable[[Tensor, Tensor], Tensor],
    ) -> "FastLayerDraft":
        """Merge a layer's factors.

        Args:
            layer: the adapter's.
            num_outputs: of the products by name.
            join_heads: orders the outputs of q, k and v, [N, R].
            join_gates: merges the outputs of gate and up, [F, R] each.
        """

        def merged(
            names: Sequence[str], order: Callable[[Sequence[Tensor]], Tensor]
        ) -> FastDraft | None:
            adapted = [name for name in names if name in layer.factors]
            if not adapted:
                return None
            downs = [layer.factors[name][0] for name in adapted]
            rank = sum(len(down) for down in downs)
            ups: list[Tensor] = []
            first = 0
            for name in names:
                up = downs[0].new_zeros(num_outputs[name], rank)
                if name in layer.factors:
                    factor = layer.factors[name][1]
                    up[:, first : first + factor.shape[1]] = factor
                    first += factor.shape[1]
                ups.append(up)
            return FastDraft.of(torch.cat(downs), order(ups).contiguous())

        return cls(
            qkv=merged(("q_proj", "k_proj", "v_proj"), lambda ups: join_heads(torch.cat([*ups]))),
            out=merged(("o_proj",), lambda ups: ups[0]),
            gate_up=merged(("gate_proj", "up_proj"), lambda ups: join_gates(*ups)),
            down=merged(("down_proj",), lambda ups: ups[0]),
        )
