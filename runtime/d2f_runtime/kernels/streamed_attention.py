"""The attention of `attention`, with keys and values brought by the copy engine of a Hopper GPU.

All blocks that fit into shared memory are asked for at once, by one thread, and arrive while the
queries do. Those of earlier steps do not depend on the kernel in front, so they are under way
before it has ended (programmatic dependent launch).

Shapes: M rows, H query heads, KV key/value heads, hd head size, T pool places, N tiles, S splits.
"""

import torch
from torch import Tensor

from d2f_runtime.kernels.gluon import (
    HAS_GLUON,
    TensorDescriptor,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    thread_barrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from d2f_runtime.kernels.language import (
    MULTIPROCESSORS,
    gdc_launch_dependents,
    gdc_wait,
    is_hopper,
    power_of_2,
)

__all__ = ["can_stream", "part_dtype", "streamed_attention"]

KEYS = 64  # of a block
QUERIES = 64  # of a program: the rows of a matrix instruction
WARPS = 4
MAX_ROWS = 512  # more rows run uncaptured, where making tensor maps takes longer than they save
HEAD_SIZES = (64, 128)
LOG2_E = 1.4426950408889634


def can_stream(query: Tensor) -> bool:
    """Whether there is a kernel for these queries [M, H, hd], and it is the better one."""
    return (
        HAS_GLUON
        and query.shape[0] <= MAX_ROWS
        and query.element_size() == 2
        and query.shape[2] in HEAD_SIZES
        and is_hopper(query.device)
    )


def part_dtype(query: Tensor, num_splits: int) -> torch.dtype:
    """Return what parts are stored in.

    Several are fp32: rounded each, they would make a row's result depend on how many programs its
    keys are shared by, and so on what else is in the step.
    """
    return query.dtype if num_splits == 1 else torch.float32


def streamed_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    visible: Tensor,
    tiles: Tensor,
    positions: Tensor | None,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    """Return parts [S, M, H, hd] and the log2 of the sums of their weights, [S, M, H].

    Args:
        query: [M, H, hd], rotated, 16 bits; hd is 64 or 128.
        keys: [T, KV, hd] of the pool.
        values: like keys.
        visible: see `attention.attend_reference`.
        tiles: see `attention.attend_reference`.
        positions: [M] of the rows; what lies before the first of a session is not new. None asks
            for nothing early.
        num_splits: S.
    """
    num_rows, num_heads, size = query.shape
    num_kv = keys.shape[1]
    shape = (num_splits, num_rows, num_heads)
    parts = torch.empty((*shape, size), device=query.device, dtype=part_dtype(query, num_splits))
    weights = torch.empty(shape, device=query.device, dtype=torch.float32)
    num_programs = tiles.shape[0] * num_kv * num_splits
    _attend[(tiles.shape[0], num_kv, num_splits)](
        query, _described(keys), _described(values), positions, visible, tiles, parts, weights,
        num_rows, tiles.shape[0], size**-0.5 * LOG2_E,
        H=num_heads, KV=num_kv, G=num_heads // num_kv, HD=size, QUERIES=QUERIES, KEYS=KEYS,
        STAGES=4 if num_programs <= MULTIPROCESSORS else 3,  # one or two programs on a processor
        TILES=power_of_2(tiles.shape[0]),
        num_warps=WARPS, launch_pdl=True,
    )  # fmt: skip
    return parts, weights


def _described(pool: Tensor) -> "TensorDescriptor":
    kind = gl.bfloat16 if pool.dtype == torch.bfloat16 else gl.float16
    block = [KEYS, pool.shape[2]]
    layout = gl.NVMMASharedLayout.get_default_for(block, kind)
    return TensorDescriptor.from_tensor(pool.view(pool.shape[0], -1), block, layout)


if HAS_GLUON:

    @gluon.jit
    def _attend(
        query, keys, values, positions, visible, tiles, parts, weights, num_rows, num_tiles, scale,
        H: gl.constexpr, KV: gl.constexpr, G: gl.constexpr, HD: gl.constexpr,
        QUERIES: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr,
        num_warps: gl.constexpr,
    ):  # fmt: skip
        kind: gl.constexpr = keys.dtype
        by_score: gl.constexpr = gl.NVMMADistributedLayout(
            version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, KEYS, 16]
        )
        by_out: gl.constexpr = gl.NVMMADistributedLayout(
            version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, HD, 16]
        )
        by_row: gl.constexpr = gl.BlockedLayout(
            [1, 8], [256 // HD, HD // 8], [num_warps, 1], [1, 0]
        )
        key_ring = gl.allocate_shared_memory(kind, [STAGES, KEYS, HD], keys.layout)
        value_ring = gl.allocate_shared_memory(kind, [STAGES, KEYS, HD], values.layout)
        state_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([QUERIES, HD], kind)
        state = gl.allocate_shared_memory(kind, [QUERIES, HD], state_layout)
        # of keys, then of values
        ready = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2 * STAGES):
            mbarrier.init(ready.index(i), count=1)
        # what the host sent does not come from the kernel before
        tile = tiles + gl.program_id(0) * 5
        first_row, count = gl.load(tile), gl.load(tile + 1)
        offset, border, elsewhere = gl.load(tile + 2), gl.load(tile + 3), gl.load(tile + 4)
        kv, split = gl.program_id(1), gl.program_id(2)
        item = gl.arange(0, QUERIES, gl.SliceLayout(1, by_score))
        real = item < count * G
        row = first_row + item // G
        until = gl.load(visible + row, mask=real, other=0)
        longest = gl.max(until, axis=0)
        share = gl.cdiv(gl.cdiv(longest, KEYS), gl.num_programs(2)) * KEYS
        begin = split * share
        end = gl.minimum(begin + share, longest)
        # positions up to the border lie at one place of the pool, the others at another
        near = gl.minimum(end, border)
        far = gl.maximum(begin, border)
        num_near = gl.cdiv(gl.maximum(near - begin, 0), KEYS)
        num_blocks = num_near + gl.cdiv(gl.maximum(end - far, 0), KEYS)
        old = 0  # positions before this one are of earlier steps
        if positions is not None:
            other = gl.arange(0, TILES, gl.BlockedLayout([1], [32], [num_warps], [0]))
            theirs = tiles + other * 5
            inside = other < num_tiles
            same = (gl.load(theirs + 2, mask=inside, other=-1) == offset) & (
                gl.load(theirs + 1, mask=inside, other=0) > 0
            )
            rows = gl.load(theirs, mask=inside, other=0)
            lowest = gl.min(gl.where(same, rows, 2147483647), axis=0)
            old = gl.load(positions + gl.minimum(lowest, first_row))
            for i in gl.static_range(STAGES):
                position = begin + i * KEYS
                is_old = (i < num_near) & (position + KEYS <= old)
                _ask(keys, key_ring, ready, kv, offset + position, i, i, is_old, HD)
                _ask(values, value_ring, ready, kv, offset + position, i, STAGES + i, is_old, HD)
        gdc_launch_dependents()
        gdc_wait()
        for i in gl.static_range(STAGES):
            position = begin + i * KEYS
            is_new = i < num_blocks
            if positions is not None:
                is_new = is_new & ((i >= num_near) | (position + KEYS > old))
            place = gl.where(
                i < num_near, offset + position, elsewhere + far + (i - num_near) * KEYS
            )
            _ask(keys, key_ring, ready, kv, place, i, i, is_new, HD)
            _ask(values, value_ring, ready, kv, place, i, STAGES + i, is_new, HD)
        item_of = gl.arange(0, QUERIES, gl.SliceLayout(1, by_row))
        dim = gl.arange(0, HD, gl.SliceLayout(0, by_row))
        at = ((first_row + item_of // G).to(gl.int64) * H + kv * G + item_of % G)[:, None] * HD
        asked = gl.load(query + at + dim[None, :], mask=(item_of < count * G)[:, None], other=0.0)
        state.store(asked)
        fence_async_shared()
        thread_barrier()
        highest = gl.full((QUERIES,), -1e30, gl.float32, gl.SliceLayout(1, by_score))
        total = gl.zeros((QUERIES,), gl.float32, gl.SliceLayout(1, by_score))
        out = gl.zeros((QUERIES, HD), gl.float32, by_out)
        nothing = gl.zeros((QUERIES, KEYS), gl.float32, by_score)
        lane = gl.arange(0, KEYS, gl.SliceLayout(0, by_score))
        for block in range(num_blocks):
            stage = block % STAGES
            phase = (block // STAGES) & 1
            mbarrier.wait(ready.index(stage), phase)
            score = warpgroup_mma(
                state, key_ring.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            is_near = block < num_near
            first = gl.where(is_near, begin + block * KEYS, far + (block - num_near) * KEYS)
            limit = gl.where(is_near, near, end)
            key_at = first + lane
            score = warpgroup_mma_wait(num_outstanding=0, deps=(score,)) * scale
            allowed = (key_at[None, :] < until[:, None]) & (key_at < limit)[None, :]
            score = gl.where(allowed, score, -1e30)
            top = gl.maximum(highest, gl.max(score, axis=1))
            # a query that sees nothing here keeps its sum at 0
            weight = gl.where(allowed, gl.exp2(score - top[:, None]), 0.0)
            fade = gl.exp2(highest - top)
            total = total * fade + gl.sum(weight, axis=1)
            highest = top
            left = gl.convert_layout(weight.to(kind), gl.DotOperandLayout(0, by_out, 2))
            out = out * gl.convert_layout(fade, gl.SliceLayout(1, by_out))[:, None]
            mbarrier.wait(ready.index(STAGES + stage), phase)
            if first + KEYS > limit:
                # what lies beyond is another slot's: its weight is 0, which NaN survives
                place_of = first + gl.arange(0, KEYS, gl.SliceLayout(1, by_row))
                value = value_ring.index(stage).load(by_row)
                value = gl.where((place_of < limit)[:, None], value, gl.zeros_like(value))
                thread_barrier()
                value_ring.index(stage).store(value)
                fence_async_shared()
                thread_barrier()
            out = warpgroup_mma(left, value_ring.index(stage), out, is_async=True)
            out, _ = warpgroup_mma_wait(num_outstanding=0, deps=(out, left))
            thread_barrier()
            later = block + STAGES
            place = gl.where(
                later < num_near, offset + begin + later * KEYS,
                elsewhere + far + (later - num_near) * KEYS,
            )  # fmt: skip
            wanted = later < num_blocks
            _ask(keys, key_ring, ready, kv, place, stage, stage, wanted, HD)
            _ask(values, value_ring, ready, kv, place, stage, STAGES + stage, wanted, HD)
        # log2 of the sum of all weights of this part; -inf where there are none
        log = gl.where(total > 0, highest + gl.log2(gl.maximum(total, 1e-30)), float("-inf"))
        head = kv * G + item % G
        gl.store(weights + (split * num_rows + row).to(gl.int64) * H + head, log, mask=real)
        share_of = gl.where(total > 0, 1.0 / gl.maximum(total, 1e-30), 1.0)
        out = out * gl.convert_layout(share_of, gl.SliceLayout(1, by_out))[:, None]
        value = gl.convert_layout(out.to(parts.dtype.element_ty), by_row)
        at += split.to(gl.int64) * num_rows * H * HD
        gl.store(parts + at + dim[None, :], value, mask=(item_of < count * G)[:, None])

    @gluon.jit
    def _ask(pool, ring, ready, kv, place, stage, barrier, wanted, HD: gl.constexpr):
        """Fill a stage with the rows of a head from a place of the pool on."""
        mbarrier.expect(ready.index(barrier), pool.block_type.nbytes, pred=wanted)
        tma.async_copy_global_to_shared(
            pool, [place, kv * HD], ready.index(barrier), ring.index(stage), pred=wanted
        )
