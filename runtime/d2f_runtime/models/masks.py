"""Attention masks of windows: who sees whom, from one integer a row.

Shapes: B rows, W window positions, P cached positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MaskRows", "block_causal_mask", "branched_mask"]


def block_causal_mask(
    start: Tensor, visible_until: Tensor, num_cached: int, rows: slice = slice(None)
) -> Tensor:
    """Return who sees whom as [B, 1, W, num_cached + W] bool.

    Args:
        start: [B] int64, canvas position of each row's window; its first `start` cached columns
            hold K/V, any column between `start` and `num_cached` is padding.
        visible_until: [B, W] int64, one past the last canvas position that each query sees.
        num_cached: columns of the cache, the same for all rows.
        rows: the queries to return, of the W.
    """
    window = visible_until.shape[1]
    visible_until = visible_until[:, rows]
    cached = torch.arange(num_cached, device=start.device)
    ahead = torch.arange(window, device=start.device)
    in_cache = cached[None, :] < start[:, None]  # [B, P]
    cached_mask = in_cache[:, None, :] & (cached[None, None, :] < visible_until[:, :, None])
    window_mask = (start[:, None] + ahead[None, :])[:, None, :] < visible_until[:, :, None]
    return torch.cat([cached_mask, window_mask], dim=2)[:, None]  # [B, 1, W, P + W]


def branched_mask(
    start: Tensor, visible_until: Tensor, num_cached: int, *, positions: Tensor, branch: Tensor
) -> Tensor:
    """Return a `block_causal_mask` of windows with branches.

    A row of a branch sees the rows outside of branches before `visible_until`, and its own branch.

    Args:
        start: see `block_causal_mask`, as for the next two.
        visible_until: [B, W].
        num_cached: columns of the cache.
        positions: [B, W] of the rows on the canvas.
        branch: [B, W] number of the row's branch, 0 outside.
    """
    mask = block_causal_mask(start, visible_until, num_cached)
    before = positions[:, None, :] < visible_until[:, :, None]
    query, key = branch[:, :, None], branch[:, None, :]
    mask[:, 0, :, num_cached:] = ((key == 0) & before) | ((key == query) & (query > 0))
    return mask


@dataclass(frozen=True, slots=True)
class MaskRows:
    """A `block_causal_mask` made a few queries at a time; a whole one grows with a prompt's square.

    Attributes: those of `block_causal_mask`, and how many queries at a time.
    """

    start: Tensor
    visible_until: Tensor
    num_cached: int
    num_rows: int

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield queries and their part of the mask."""
        for first in range(0, self.visible_until.shape[1], self.num_rows):
            rows = slice(first, first + self.num_rows)
            yield rows, block_causal_mask(self.start, self.visible_until, self.num_cached, rows)
