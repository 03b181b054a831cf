"""Block-causal attention of a step's queries over the K/V of their slots, as they lie in the pool.

Queries of several sessions, of any lengths, run in one launch. A tile is a few consecutive rows of
one session with all query heads that share a key/value head. Who sees whom is one integer per row;
no mask exists. The keys of a tile are split over several programs (flash-decoding, Dao et al. 2023)
and a second kernel joins their parts. On Hopper the first kernel is that of `streamed_attention`.

Shapes: M rows, H query heads, KV key/value heads, hd head size, T pool places, N tiles, S splits.
"""

import torch
from torch import Tensor

from d2f_runtime.kernels.activation import FP8, Activation, quantise_rows, row_scale
from d2f_runtime.kernels.language import (
    MULTIPROCESSORS,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    overlaps,
    power_of_2,
    tl,
)
from d2f_runtime.kernels.streamed_attention import can_stream, part_dtype, streamed_attention

__all__ = ["TILE_FIELDS", "attend", "attend_reference", "rows_per_tile", "tile_size"]

TILE_FIELDS = 5
"""Of a tile: first row, number of rows (0: unused), pool place of canvas position 0, canvas
position from which K/V lie elsewhere, and pool place that position 0 would have there."""

BLOCK = 64  # keys that a program reads at once
TILE = 64  # queries of a program, at most
WARPS = 4
STAGES = 3
MAX_SPLITS = 8
LOG2_E = 1.4426950408889634


def tile_size(num_rows: int, group: int) -> int:
    """Return how many queries a tile holds, given the rows of a step and query heads per KV head.

    Powers of two that the matrix units take; larger ones read K/V less often.
    """
    queries = num_rows * group
    return min(TILE, max(16, power_of_2(queries), power_of_2(group)))


def rows_per_tile(num_rows: int, group: int) -> int:
    """Return how many rows a tile of `tile_size` holds."""
    return tile_size(num_rows, group) // group


def attend_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    visible: Tensor,
    tiles: Tensor,
    num_splits: int = 1,
    quantise: bool = False,
    positions: Tensor | None = None,
) -> Activation:
    """Return the attention's output [M, H hd]; zeros at rows that see nothing.

    Args:
        query: [M, H, hd], rotated.
        keys: [T, KV, hd] of the pool, rotated.
        values: like keys.
        visible: [M] int32, one past the last canvas position that each row sees; 0 for padding.
        tiles: [N, TILE_FIELDS] int32; every row that sees something is in one.
        num_splits: programs that share the keys of a tile; no part of the result, nor needed.
        quantise: whether the rows become fp8.
        positions: [M] int32, canvas positions of the rows; no part of the result. K/V before a
            session's first one must not come from the kernel in front.
    """
    num_rows, num_heads, size = query.shape
    group = num_heads // keys.shape[1]
    out = torch.zeros((num_rows, num_heads, size), device=query.device)
    for first, count, offset, split, elsewhere in tiles.tolist():
        for row in range(first, first + count):
            position = torch.arange(int(visible[row]), device=query.device)
            place = torch.where(position < split, offset, elsewhere) + position
            key, value = keys[place].float(), values[place].float()  # [P, KV, hd]
            key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
            score = torch.einsum("hd,phd->hp", query[row].float(), key) / size**0.5
            out[row] = torch.einsum("hp,phd->hd", score.softmax(dim=1), value)
    rows = out.flatten(1)
    return quantise_rows(rows) if quantise else Activation(rows.to(query.dtype))


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    visible: Tensor,
    tiles: Tensor,
    num_splits: int | None = None,
    quantise: bool = False,
    positions: Tensor | None = None,
) -> Activation:
    """Do what `attend_reference` does. `tiles` must have been cut by `rows_per_tile`."""
    num_rows, num_heads, size = query.shape
    num_splits = num_splits or _num_splits(query, tiles.shape[0] * keys.shape[1])
    if can_stream(query):
        parts, weights = streamed_attention(
            query, keys, values,
            visible=visible, tiles=tiles, num_splits=num_splits, positions=positions,
        )  # fmt: skip
    else:
        parts, weights = _parts(query, keys, values, visible, tiles, num_splits)
    dtype = FP8 if quantise else query.dtype
    rows = torch.empty((num_rows, num_heads * size), device=query.device, dtype=dtype)
    scale = torch.empty(num_rows, device=query.device, dtype=torch.float32) if quantise else None
    pdl = overlaps(query.device)
    _join[(num_rows,)](
        parts, weights, visible, rows, scale, num_rows,
        H=num_heads, HD=size, S=num_splits, HEADS=power_of_2(num_heads), PDL=pdl,
        num_warps=16 if num_heads * size >= 2048 else 4, launch_pdl=pdl,
    )  # fmt: skip
    return Activation(rows, scale)


def _num_splits(query: Tensor, num_tiles: int) -> int:
    """Return how many programs share the keys of a tile.

    Two programs fill a multiprocessor's registers, so that the join cannot be there before they
    end: one is better where that is still two for each tile, but for few rows, soon joined.
    """
    num_tiles = max(1, num_tiles)
    programs = 2 * MULTIPROCESSORS
    if can_stream(query) and query.shape[0] > 16 and 2 * num_tiles <= MULTIPROCESSORS:
        programs = MULTIPROCESSORS
    return max(1, min(MAX_SPLITS, programs // num_tiles))


def _parts(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, tiles: Tensor, num_splits: int
) -> tuple[Tensor, Tensor]:
    """Return parts [S, M, H, hd] and the log2 of the sums of their weights, [S, M, H]."""
    num_rows, num_heads, size = query.shape
    num_kv = keys.shape[1]
    group = num_heads // num_kv
    shape = (num_splits, num_rows, num_heads)
    parts = torch.empty((*shape, size), device=query.device, dtype=part_dtype(query, num_splits))
    weights = torch.empty(shape, device=query.device, dtype=torch.float32)
    pdl = overlaps(query.device)
    _attend[(tiles.shape[0], num_kv, num_splits)](
        query, keys, values, visible, tiles, parts, weights, num_rows, size**-0.5 * LOG2_E,
        H=num_heads, KV=num_kv, G=group, HD=size, QUERIES=tile_size(num_rows, group), KEYS=BLOCK,
        PDL=pdl, num_warps=WARPS, num_stages=_num_stages(query), launch_pdl=pdl,
    )  # fmt: skip
    return parts, weights


def _num_stages(query: Tensor) -> int:
    """Return how many blocks of K/V are under way at once: as many as shared memory holds."""
    is_large = query.element_size() == 2 and overlaps(query.device)  # an H100 has 227 KB
    return STAGES if is_large else 2


@jit
def _attend(
    query, keys, values, visible, tiles, parts, weights, num_rows, scale,
    H: tl.constexpr, KV: tl.constexpr, G: tl.constexpr, HD: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # what the host sent does not come from the kernel before
    tile = tiles + tl.program_id(0) * 5
    first_row, count = tl.load(tile), tl.load(tile + 1)
    offset = tl.load(tile + 2).to(tl.int64)
    border = tl.load(tile + 3)
    elsewhere = tl.load(tile + 4).to(tl.int64)
    kv, split = tl.program_id(1), tl.program_id(2)
    item = tl.arange(0, QUERIES)
    real = item < count * G
    row = first_row + item // G
    head = kv * G + item % G
    until = tl.load(visible + row, mask=real, other=0)
    longest = tl.max(until, axis=0)
    dim = tl.arange(0, HD)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if count == 0:
        return
    state = tl.load(
        query + (row.to(tl.int64) * H + head)[:, None] * HD + dim[None, :],
        mask=real[:, None], other=0.0,
    )  # fmt: skip
    share = tl.cdiv(tl.cdiv(longest, KEYS), tl.num_programs(2)) * KEYS
    begin = split * share
    end = tl.minimum(begin + share, longest)
    highest = tl.full((QUERIES,), -1e30, dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    out = tl.zeros((QUERIES, HD), dtype=tl.float32)
    for first in range(begin, end, KEYS):
        position = first + tl.arange(0, KEYS)
        place = tl.where(position < border, offset, elsewhere) + position
        source = (place * KV + kv)[:, None] * HD + dim[None, :]
        # what lies beyond is another slot's, or not written: its weight is 0, which NaN survives
        seen = (position < end)[:, None]
        key = tl.load(keys + source, mask=seen, other=0.0)
        score = tl.dot(state, tl.trans(key), input_precision="ieee") * scale
        allowed = (position[None, :] < until[:, None]) & (position < end)[None, :]
        score = tl.where(allowed, score, -1e30)
        top = tl.maximum(highest, tl.max(score, axis=1))
        # a query that sees nothing here keeps its sum at 0
        weight = tl.where(allowed, tl.exp2(score - top[:, None]), 0.0)
        fade = tl.exp2(highest - top)
        total = total * fade + tl.sum(weight, axis=1)
        value = tl.load(values + source, mask=seen, other=0.0)
        out = tl.dot(weight.to(value.dtype), value, out * fade[:, None], input_precision="ieee")
        highest = top
    at = (split * num_rows + row).to(tl.int64) * H + head
    # log2 of the sum of all weights of this part; -inf where there are none
    log = tl.where(total > 0, highest + tl.log2(tl.maximum(total, 1e-30)), float("-inf"))
    tl.store(weights + at, log, mask=real)
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    to_parts = parts + at[:, None] * HD + dim[None, :]
    tl.store(to_parts, out.to(parts.dtype.element_ty), mask=real[:, None])


@jit
def _join(
    parts, weights, visible, rows, scale, num_rows,
    H: tl.constexpr, HD: tl.constexpr, S: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.arange(0, HEADS)
    dim = tl.arange(0, HD)
    # padding is in no tile, so that its parts were never written
    inside = (head < H) & (tl.load(visible + row) > 0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    highest = tl.full((HEADS,), float("-inf"), dtype=tl.float32)
    for split in tl.static_range(S):
        at = (split * num_rows + row).to(tl.int64) * H + head
        highest = tl.maximum(highest, tl.load(weights + at, mask=inside, other=0.0))
    total = tl.zeros((HEADS,), dtype=tl.float32)
    out = tl.zeros((HEADS, HD), dtype=tl.float32)
    for split in tl.static_range(S):
        at = (split * num_rows + row).to(tl.int64) * H + head
        weight = tl.exp2(tl.load(weights + at, mask=inside, other=0.0) - highest)
        total += weight
        part = tl.load(parts + at[:, None] * HD + dim[None, :], mask=inside[:, None], other=0.0)
        out += weight[:, None] * part.to(tl.float32)
    out = tl.where(inside[:, None], out / total[:, None], 0.0)
    if scale is not None:
        factor = row_scale(tl.max(tl.max(tl.abs(out), axis=1), axis=0))
        tl.store(scale + row, factor)
        out = out / factor
    at = row.to(tl.int64) * (H * HD) + head[:, None] * HD + dim[None, :]
    tl.store(rows + at, out.to(rows.dtype.element_ty), mask=(head < H)[:, None])
