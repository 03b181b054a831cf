"""Products of few rows of which some are drafts: weight and low-rank factors in one launch.

A small model's step is mostly the start of kernels: apart, an adapter adds three to each product.
Here a program that computes some outputs computes the ranks that these need, too, from the rows
that it has at hand, and adds their share to the rows that are drafts. Where none of its rows is
one, it reads no factors. A clean row's outputs are the weight's alone, to the bit.

Shapes: M rows, N outputs, K features, P ranks, W ranks of a tile of outputs, S splits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from d2f_runtime.kernels.language import (
    MULTIPROCESSORS,
    TensorDescriptor,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    overlaps,
    power_of_2,
    tl,
)

__all__ = [
    "FEATURES",
    "Cut",
    "TiledFactors",
    "cut_for",
    "drafted_product",
    "drafted_product_reference",
    "outputs_of_tile",
]

FEATURES = 64  # of a tile: a line of shared memory
MAX_WIDTH = 128  # ranks of a tile, whose sums a program holds beside its outputs'
MAX_ROWS = 256  # beyond, the ranks that every program computes anew cost more than launches
MAX_SPLITS = 8
WIDE = 128  # outputs of a tile, where there are many
ROWS = 128  # of a tile, at most


@dataclass(frozen=True, slots=True)
class Cut:
    """How a product is cut.

    Attributes:
        splits: programs that share the features of an output.
        rows: of a tile, at most.
        stages: tiles under way at once.
        warps: of a program.
    """

    splits: int = 1
    rows: int = ROWS
    stages: int = 4
    warps: int = 4


@dataclass(frozen=True, slots=True)
class TiledFactors:
    """An adapter's factors by tiles of outputs, each of which needs a few of the ranks.

    Attributes:
        down: [P, K].
        up: [N, W], of an output the columns from its tile's first rank on.
        starts: [N / outputs] int32 first rank of each tile.
        outputs: of a tile.
    """

    down: Tensor
    up: Tensor
    starts: Tensor
    outputs: int

    @classmethod
    def of(cls, down: Tensor, up: Tensor, outputs: int) -> "TiledFactors | None":
        """Cut factors [R, K] and [N, R], whose zeros say which ranks an output needs.

        None where a tile needs more than fit, or the shapes are no multiples of tiles.
        """
        num_outputs, num_ranks = up.shape
        if num_outputs % outputs or down.shape[1] % FEATURES:
            return None
        needed = up.view(-1, outputs, num_ranks).abs().amax(dim=1) > 0  # [tiles, R]
        rank = torch.arange(num_ranks, device=up.device)
        first = torch.where(needed, rank, num_ranks).amin(dim=1)
        last = torch.where(needed, rank, -1).amax(dim=1)
        first = torch.where(last < 0, 0, first)
        width = max(16, power_of_2(int((last - first).max()) + 1))
        if width > MAX_WIDTH:
            return None
        padded = int(first.max()) + width
        down = torch.cat([down, down.new_zeros(max(0, padded - num_ranks), down.shape[1])])
        up = torch.cat([up, up.new_zeros(num_outputs, max(0, padded - num_ranks))], dim=1)
        columns = (first[:, None] + torch.arange(width, device=up.device)).repeat_interleave(
            outputs, dim=0
        )
        return cls(down.contiguous(), up.gather(1, columns).contiguous(), first.int(), outputs)


def outputs_of_tile(num_outputs: int) -> int:
    """Return how many outputs a tile has: few where there would be too few programs otherwise."""
    return WIDE if num_outputs // WIDE >= MULTIPROCESSORS // 2 else 64


def cut_for(num_rows: int, num_features: int, outputs: int, *, may_split: bool) -> Cut | None:
    """Return how a product is cut; None where three launches more are the better choice.

    The choices are measured ones (bench/drafted-products-*.json), for an H200.

    Args:
        num_rows: M.
        num_features: K.
        outputs: of a tile.
        may_split: whether the reader adds parts.
    """
    is_wide = outputs == WIDE
    if num_rows > (ROWS if is_wide else MAX_ROWS):
        return None
    splits = 1
    if may_split:
        # whatever the number of rows, so that it does not decide how a row is rounded
        splits = min(MAX_SPLITS, num_features // (2 * FEATURES))
        splits = 1 << max(1, splits).bit_length() - 1
    return Cut(splits, warps=8 if is_wide and num_rows > 32 else 4)


def drafted_product_reference(
    x: Tensor, weight: Tensor, factors: TiledFactors, drafts: Tensor, *, cut: Cut
) -> Tensor:
    """Return [S, M, N] parts whose sum over S is the product, with their share for draft rows.

    One part is rounded to the rows' dtype; several are fp32, so that a row's sum hardly depends on
    how many rows stand beside it.

    Args:
        x: [M, K].
        weight: [N, K].
        factors: of the weight.
        drafts: [M] int32, 1 for draft rows and 0 for others.
        cut: S is its number of splits.
    """
    steps = -(-x.shape[1] // FEATURES)
    share = -(-steps // cut.splits) * FEATURES
    down, up = (
        factors.down.float(),
        factors.up.float().view(-1, factors.outputs, factors.up.shape[1]),
    )
    parts = []
    for first in range(0, share * cut.splits, share):
        rows = x[:, first : first + share].float()
        part = rows @ weight[:, first : first + share].float().T
        low = (rows @ down[:, first : first + share].T) * drafts[:, None]
        low = low.to(x.dtype).float()
        for tile, start in enumerate(factors.starts.tolist()):
            columns = slice(tile * factors.outputs, (tile + 1) * factors.outputs)
            part[:, columns] += low[:, start : start + up.shape[2]] @ up[tile].T
        parts.append(part)
    return torch.stack(parts).to(x.dtype if cut.splits == 1 else torch.float32)


def drafted_product(
    x: Tensor, weight: Tensor, factors: TiledFactors, drafts: Tensor, *, cut: Cut
) -> Tensor:
    """Do what `drafted_product_reference` does."""
    num_rows, num_features = x.shape
    num_outputs, width = factors.up.shape
    tile = min(cut.rows, max(16, power_of_2(num_rows)))
    steps = num_features // FEATURES
    shape = (cut.splits, num_rows, num_outputs)
    dtype = weight.dtype if cut.splits == 1 else torch.float32
    parts = torch.empty(shape, device=weight.device, dtype=dtype)
    pdl = overlaps(weight.device)
    _product[(num_outputs // factors.outputs, cut.splits, -(-num_rows // tile))](
        TensorDescriptor.from_tensor(x, [tile, FEATURES]),
        TensorDescriptor.from_tensor(weight, [factors.outputs, FEATURES]),
        TensorDescriptor.from_tensor(factors.down, [width, FEATURES]),
        factors.up, factors.starts, drafts, parts, num_rows, num_outputs, num_features,
        -(-steps // cut.splits) * FEATURES,
        ROWS=tile, OUTPUTS=factors.outputs, WIDTH=width, STEP=FEATURES, PDL=pdl,
        num_warps=cut.warps, num_stages=cut.stages, launch_pdl=pdl,
    )  # fmt: skip
    return parts


@jit
def _product(
    rows, columns, down, up, starts, drafts, parts, num_rows, num_outputs, num_features, share,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    first_output, first_row = tile * OUTPUTS, tl.program_id(2) * ROWS
    start = tl.load(starts + tile)
    output = first_output + tl.arange(0, OUTPUTS)
    row = first_row + tl.arange(0, ROWS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    is_draft = tl.load(drafts + row, mask=row < num_rows, other=0)
    total = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
    begin = split * share
    end = tl.minimum(begin + share, num_features)
    if tl.max(is_draft, axis=0) > 0:
        low = tl.zeros((WIDTH, ROWS), dtype=tl.float32)
        for first in range(begin, end, STEP):
            x = tl.trans(rows.load([first_row, first]))
            weight = columns.load([first_output, first])
            total = tl.dot(weight, x, total, input_precision="ieee")
            low = tl.dot(down.load([start, first]), x, low, input_precision="ieee")
        rank = tl.arange(0, WIDTH)
        factor = tl.load(up + output[:, None] * WIDTH + rank[None, :])
        low = tl.where(is_draft[None, :] > 0, low, 0.0).to(factor.dtype)
        total = tl.dot(factor, low, total, input_precision="ieee")
    else:
        for first in range(begin, end, STEP):
            x = tl.trans(rows.load([first_row, first]))
            weight = columns.load([first_output, first])
            total = tl.dot(weight, x, total, input_precision="ieee")
    at = (split * num_rows + row).to(tl.int64)[:, None] * num_outputs + output[None, :]
    value = tl.trans(total).to(parts.dtype.element_ty)
    tl.store(parts + at, value, mask=(row < num_rows)[:, None])
