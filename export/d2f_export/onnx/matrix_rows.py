"""A model's matrices on their way into a graph: their joined rows in fp32, some at a time."""

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from d2f_export.onnx.graph_builder import Array

__all__ = ["by_rows"]

ROWS_AT_ONCE: Final = 4096  # bounds the memory of a conversion


def by_rows(matrices: Sequence[Tensor], convert: Callable[[int, Array], None]) -> None:
    """Call `convert` with the number of the first row and the rows, [n, K] fp32, of each piece."""
    first = 0
    for matrix in matrices:
        for piece in torch.split(matrix, ROWS_AT_ONCE):
            convert(first, piece.float().numpy())
            first += len(piece)
