"""FastDraft: a draft adapter's factors as the fast step multiplies them, by merged product.

Every row goes through the narrow products, and what is no draft is multiplied by zero between them:
shapes stay static, so that CUDA graphs hold them. A clean row's outputs keep their bits.

Shapes: M rows, K inputs, N outputs, R ranks of the products that are merged.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from d2f_runtime.kernels.activation import Activation
from d2f_runtime.models.draft_adapter import LayerDraft

__all__ = ["FastDraft", "FastLayerDraft"]


@dataclass(frozen=True, slots=True)
class FastDraft:
    """The factors of one merged product.

    Attributes:
        down: [R, K].
        up: [N, R], outputs ordered as the product's; a block for each of what is merged.
    """

    down: Tensor
    up: Tensor

    def add(self, x: Activation, drafts: Tensor, out: Tensor) -> None:
        """Add the share of the draft rows to a product, in place.

        Args:
            x: what was multiplied.
            drafts: [M, 1] in the model's dtype, 1 for draft rows and 0 for others.
            out: [M, N].
        """
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
            return FastDraft(torch.cat(downs), order(ups).contiguous())

        return cls(
            qkv=merged(("q_proj", "k_proj", "v_proj"), lambda ups: join_heads(torch.cat([*ups]))),
            out=merged(("o_proj",), lambda ups: ups[0]),
            gate_up=merged(("gate_proj", "up_proj"), lambda ups: join_gates(*ups)),
            down=merged(("down_proj",), lambda ups: ups[0]),
        )
