"""Visibility: who sees whom in the clean and in the noisy half of a batch.

A clean position sees its own document up to itself. A noisy one sees the clean positions of its
document before its window, and the noisy ones of its window up to and including its own block.

One object holds the tensors that the masks read, always the same ones, so that compiled code meets
the same functions at every step.
"""

from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from d2f_export.distill.from_ar.feed import Batch
from d2f_export.distill.from_ar.streams import AttentionMask

__all__ = ["Visibility"]

_NAMES: Final = ("clean_doc", "doc_start", "window_start", "window", "block")


class Visibility:
    """The masks of a batch.

    Args:
        rows: R.
        clean_length: C.
        noisy_length: N.
        device: of the masks.
        fused: make flex_attention's BlockMask, else bool tensors.
    """

    def __init__(
        self, rows: int, clean_length: int, noisy_length: int, device: torch.device, *, fused: bool
    ) -> None:
        self._sizes = rows, clean_length, noisy_length
        self._device, self._fused = device, fused
        self._held = {
            name: torch.zeros(
                rows,
                clean_length if name == "clean_doc" else noisy_length,
                dtype=torch.int32,
                device=device,
            )
            for name in _NAMES
        }
        doc = self._held["clean_doc"]
        doc_start, window_start = self._held["doc_start"], self._held["window_start"]
        window, block = self._held["window"], self._held["block"]

        def clean(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (doc[row, query] == doc[row, key]) & (key <= query)

        def noisy(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            before = (key >= doc_start[row, query]) & (key < window_start[row, query])
            other = (key - clean_length).clamp(min=0)
            near = (window[row, query] == window[row, other]) & (
                block[row, other] <= block[row, query]
            )
            return torch.where(key < clean_length, before, near)

        self._clean, self._noisy = clean, noisy
        self._make = create_block_mask
        if fused:
            self._make = torch.compile(create_block_mask, dynamic=False)

    def masks(self, batch: Batch) -> tuple[AttentionMask, AttentionMask]:
        """Return the masks of the clean and of the noisy half; they hold until the next call."""
        for name, held in self._held.items():
            held.copy_(batch[name])
        rows, clean, noisy = self._sizes
        return self._mask(self._clean, rows, clean, clean), self._mask(
            self._noisy, rows, noisy, clean + noisy
        )

    def _mask(self, sees: Any, rows: int, queries: int, keys: int) -> AttentionMask:
        if self._fused:
            made = self._make(sees, rows, None, queries, keys, device=str(self._device))
            return made
        row = torch.arange(rows, device=self._device)[:, None, None]
        query = torch.arange(queries, device=self._device)[None, :, None]
        key = torch.arange(keys, device=self._device)[None, None, :]
        return cast(Tensor, sees(row, row, query, key))[:, None]
