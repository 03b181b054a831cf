"""A GGUF file loaded, and its logits."""

import torch
from torch import Tensor

from d2f_runtime.models.transformer import Transformer

TOKENS = torch.randint(0, 290, (1, 40), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Transformer) -> Tensor:
    positions = torch.arange(TOKENS.shape[1])[None]
    hidden, _ = model(TOKENS, positions, None, causal=True)
    return model.logits(hidden)
