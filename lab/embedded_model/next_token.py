"""NextToken: the noise of the autoregressive twin, which is none."""

from dataclasses import dataclass

import torch

from d2f_export.distill.corruption import Corrupted, block_indices
from d2f_export.distill.feed import Batch

__all__ = ["NextToken"]


@dataclass(frozen=True, slots=True)
class NextToken:
    """Masks nothing, and asks for every position of the answer: the autoregressive objective."""

    def draw(self, batch: Batch, generator: torch.Generator, *, mask_id: int) -> Corrupted:
        """Return the batch as it is."""
        blocks = block_indices(batch.prompt_lens, batch.tokens.shape[1], 1)
        ratio = torch.ones_like(blocks, dtype=torch.float32)
        return Corrupted(batch.tokens, batch.tokens, blocks >= 0, ratio, blocks)
