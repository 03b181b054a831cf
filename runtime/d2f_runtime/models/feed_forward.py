"""The dense feed-forward of a layer, and what an expert is.

Shapes: D hidden size.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from d2f_runtime.models.draft_adapter import LayerDraft

__all__ = ["FeedForward"]


class FeedForward(nn.Module):
    """SwiGLU: of a layer, or of one of its experts.

    Args:
        hidden_size: D.
        ffn_size: its width.
        product: of its three products.
    """

    def __init__(
        self, hidden_size: int, ffn_size: int, *, product: type[nn.Linear] = nn.Linear
    ) -> None:
        super().__init__()
        self.gate_proj = product(hidden_size, ffn_size, bias=False)
        self.up_proj = product(hidden_size, ffn_size, bias=False)
        self.down_proj = product(ffn_size, hidden_size, bias=False)

    def forward(self, x: Tensor, draft: LayerDraft | None = None) -> Tensor:
        """Map [..., D] to [..., D]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if draft is not None:
            draft.add("gate_proj", x, gate)
            draft.add("up_proj", x, up)
        wide = F.silu(gate) * up
        out: Tensor = self.down_proj(wide)
        if draft is not None:
            draft.add("down_proj", wide, out)
        return out
