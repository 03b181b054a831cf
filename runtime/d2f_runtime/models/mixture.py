"""A feed-forward of many experts, of which each row goes through a few: LLaDA2's and SDAR-MoE's.

The router computes in fp32, with weights in fp32: sums in fewer bits choose other experts. Rows are
sorted by expert, so that each expert that is chosen multiplies its rows at once, and no other
expert's weights are read.

Shapes: M rows, D hidden size, E experts, C chosen of them.
"""

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2f_runtime.kernels.routing import choose_reference
from d2f_runtime.models.draft_adapter import LayerDraft
from d2f_runtime.models.feed_forward import FeedForward
from d2f_runtime.models.mixture_config import MixtureConfig

__all__ = ["Mixture", "Router", "sort_by_expert"]


class Router(nn.Module):
    """Chooses the experts of each row; its weights stay in fp32 whatever the model is cast to."""

    def __init__(self, hidden_size: int, config: MixtureConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.num_experts)) if config.has_bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return which experts the rows [M, D] go to, [M, C] int64, and their weights, fp32."""
        logits = F.linear(x.float(), self.weight.float())
        return choose_reference(logits, self.bias, self.config)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = {name: parameter.data for name, parameter in self.named_parameters()}
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, parameter in self.named_parameters():
            if parameter.dtype != exact[name].dtype and parameter.is_floating_point():
                parameter.data = exact[name].to(parameter.device)
        return moved


class ExpertProduct(nn.Linear):
    """A product that draws no values while it is only laid out: thousands would take seconds."""

    def reset_parameters(self) -> None:
        """Draw values, unless there is no memory for them."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Mixture(nn.Module):
    """The router, its experts, and the expert that all rows go through."""

    def __init__(self, hidden_size: int, config: MixtureConfig) -> None:
        super().__init__()
        self.router = Router(hidden_size, config)
        self.experts = nn.ModuleList(
            FeedForward(hidden_size, config.ffn_size, product=ExpertProduct)
            for _ in range(config.num_experts)
        )
        self.shared: FeedForward | None = None
        if config.shared_size:
            self.shared = FeedForward(hidden_size, config.shared_size)

    def forward(self, x: Tensor, draft: LayerDraft | None = None) -> Tensor:
        """Map [..., D] to [..., D]; there are no draft adapters of mixtures."""
        assert draft is None
        rows = x.flatten(0, -2)
        chosen, weights = self.router(rows)
        order, counts = sort_by_expert(chosen, len(self.experts))
        num_chosen = chosen.shape[1]
        out = torch.zeros_like(rows, dtype=torch.float32)
        first = 0
        for expert, count in enumerate(counts.tolist()):
            if not count:
                continue
            places = order[first : first + count]  # of [M, C], flattened
            first += count
            mine = places // num_chosen
            share = self.experts[expert](rows[mine]).float() * weights.flatten()[places, None]
            out.index_add_(0, mine, share)
        mixed = out.to(x.dtype).view(x.shape)
        return mixed if self.shared is None else mixed + self.shared(x)


def sort_by_expert(chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return the places of [M, C], flattened, expert by expert, and how many each expert has."""
    flat = chosen.flatten()
    return flat.argsort(stable=True), torch.bincount(flat, minlength=num_experts)
