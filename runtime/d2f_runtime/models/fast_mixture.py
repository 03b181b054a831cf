"""FastMixture: the experts of a layer in the fast step, as one product over all that were chosen.

Every shape depends on the number of rows alone, so that a step can be captured as a graph. The
product (torch's grouped_mm) reads the weights of experts that have rows.

Shapes: M rows, D hidden size, E experts, C chosen of them, F size of an expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from d2f_runtime.models.feed_forward import FeedForward
from d2f_runtime.models.mixture import Mixture

__all__ = ["FastMixture"]


class FastMixture:
    """The packed experts of a layer.

    Args:
        mixture: on its device, its experts dense; unchanged.
    """

    def __init__(self, mixture: Mixture) -> None:
        experts = [expert for expert in mixture.experts if isinstance(expert, FeedForward)]
        self._router = mixture.router
        self._shared = mixture.shared
        self._gate_up = torch.stack(  # [E, 2 F, D]
            [torch.cat([e.gate_proj.weight, e.up_proj.weight]).detach() for e in experts]
        )
        self._down = torch.stack([e.down_proj.weight.detach() for e in experts])  # [E, D, F]
        self._numbers = torch.arange(len(experts), device=self._down.device)

    @property
    def num_bytes(self) -> int:
        """Memory that the experts take."""
        return sum(t.numel() * t.element_size() for t in (self._gate_up, self._down))

    def __call__(self, rows: Tensor) -> Tensor:
        """Map [M, D] to [M, D]."""
        chosen, weights = self._router(rows)
        flat, num_chosen = chosen.flatten(), chosen.shape[1]
        order = flat.argsort(stable=True)
        ends = torch.searchsorted(flat[order], self._numbers, right=True).int()
        sent = rows[order // num_chosen]  # [M C, D], expert by expert
        gate, up = F.grouped_mm(sent, self._gate_up.transpose(1, 2), offs=ends).chunk(2, dim=1)
        shares = F.grouped_mm(F.silu(gate) * up, self._down.transpose(1, 2), offs=ends)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        by_row = shares[back].view(-1, num_chosen, rows.shape[1]).float()
        mixed: Tensor = (by_row * weights[..., None]).sum(dim=1).to(rows.dtype)
        return mixed if self._shared is None else mixed.add_(self._shared(rows))
