"""The product of `skinny`, with the weight's first tiles under way before its rows exist.

Between two products lie small kernels and the latencies of launches and first loads, in which the
memory stands idle. Weights depend on no kernel, so each program fills its ring of weight tiles
before it waits for the kernel in front of it (programmatic dependent launch) and asks for the rows
only then. That order cannot be said in Triton itself; this is Gluon, its lower level. Products of
many tiles run as one program per multiprocessor, whose ring goes on from tile to tile.

What would follow a product and needs nothing but a tile of it happens before the tile is stored:
the gate of a feed-forward layer, or rotary positions and the way of keys and values to the pool.

Hopper only: its matrix instructions read both operands from shared memory.

Shapes: M rows, N outputs, K features, S splits, H query heads, KV key/value heads, hd head size.
"""

import functools

import torch
from torch import Tensor

from d2f_runtime.kernels.activation import Activation
from d2f_runtime.kernels.language import gdc_launch_dependents, gdc_wait
from d2f_runtime.kernels.rope import Rotation
from d2f_runtime.kernels.skinny import Tiling

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    HAS_GLUON = True
except ImportError:
    HAS_GLUON = False

__all__ = ["HAS_GLUON", "streamed_product", "streamed_rotation"]


def streamed_product(
    x: Activation,
    weight: Tensor,
    weight_scale: Tensor | None,
    *,
    tiling: Tiling,
    dtype: torch.dtype,
    gated: bool = False,
) -> Tensor:
    """Do what `skinny_product_reference` does, on a Hopper GPU, for at most `tiling.rows` rows.

    With `gated` the outputs are gates and ups as `gate.interleave` lays them, S is 1, and the
    result is [1, M, N / 2] of what `gate.silu_gate` makes of them.
    """
    num_outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    shape = (tiling.splits, x.values.shape[0], num_outputs)
    parts = torch.empty(shape, device=weight.device, dtype=dtype)
    _launch(x, weight, weight_scale, parts, None, tiling, gated=gated)
    return parts


def streamed_rotation(
    x: Activation,
    weight: Tensor,
    weight_scale: Tensor | None,
    *,
    tiling: Tiling,
    dtype: torch.dtype,
    rotation: Rotation,
) -> Tensor:
    """Return what `rope.rotate_and_store` makes of the product, [M, H, hd]; store keys and values.

    The weight is laid as by `rope.interleave`. S must be 1, there are no head norms, and KV hd is a
    multiple of a tile's outputs.
    """
    assert tiling.splits == 1
    assert rotation.norms is None
    num_heads, size = rotation.num_heads(weight.shape[0]), rotation.keys.shape[2]
    shape = (x.values.shape[0], num_heads, size)
    query = torch.empty(shape, device=weight.device, dtype=dtype)
    _launch(x, weight, weight_scale, query, rotation, tiling)
    return query


def _launch(
    x: Activation,
    weight: Tensor,
    weight_scale: Tensor | None,
    out: Tensor,
    rotation: Rotation | None,
    tiling: Tiling,
    *,
    gated: bool = False,
) -> None:
    num_rows, num_features = x.values.shape
    assert num_rows <= tiling.rows
    num_outputs = weight.shape[0]
    steps = num_features // tiling.splits // tiling.features
    num_tiles = num_outputs // tiling.outputs
    num_programs = num_tiles
    if tiling.persistent:
        num_programs = min(num_tiles, _num_multiprocessors(weight.device))
    num_kv, size = (0, 0) if rotation is None else rotation.keys.shape[1:]
    num_heads = 0 if rotation is None else rotation.num_heads(num_outputs)
    _streamed[(num_programs, tiling.splits)](
        _described(x.values, tiling.rows, tiling.features),
        _described(weight, tiling.outputs, tiling.features),
        out, x.scale, weight_scale, *((None,) * 6 if rotation is None else rotation[:6]),
        num_rows, num_outputs, steps, num_tiles,
        ROWS=tiling.rows, OUTPUTS=tiling.outputs, FEATURES=tiling.features,
        STAGES=min(tiling.stages, steps), MANY=num_programs < num_tiles, GATED=gated,
        H=num_heads, KV=num_kv, HALF=size // 2, num_warps=tiling.warps, launch_pdl=True,
    )  # fmt: skip


def _described(matrix: Tensor, rows: int, features: int) -> "TensorDescriptor":
    kinds = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
    block = [rows, features]
    layout = gl.NVMMASharedLayout.get_default_for(block, kinds.get(matrix.dtype, gl.float8e4nv))
    return TensorDescriptor.from_tensor(matrix, block, layout)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


if HAS_GLUON:

    @gluon.jit
    def _streamed(
        rows, columns, parts, row_scales, column_scales,
        keys, values, positions, places, table, bias, num_rows, num_outputs, steps, num_tiles,
        ROWS: gl.constexpr, OUTPUTS: gl.constexpr, FEATURES: gl.constexpr, STAGES: gl.constexpr,
        MANY: gl.constexpr, GATED: gl.constexpr, H: gl.constexpr, KV: gl.constexpr,
        HALF: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        tile = gl.program_id(0)
        num_programs = gl.num_programs(0)
        split = gl.program_id(1)
        begin = split * steps * FEATURES
        num_bytes: gl.constexpr = rows.block_type.nbytes + columns.block_type.nbytes
        row_ring = gl.allocate_shared_memory(rows.dtype, [STAGES, ROWS, FEATURES], rows.layout)
        column_ring = gl.allocate_shared_memory(
            columns.dtype, [STAGES, OUTPUTS, FEATURES], columns.layout
        )
        ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(ready.index(i), count=1)
        for i in gl.static_range(STAGES):  # a tile has at least so many steps
            mbarrier.expect(ready.index(i), num_bytes)
            tma.async_copy_global_to_shared(
                columns, [tile * OUTPUTS, begin + i * FEATURES], ready.index(i),
                column_ring.index(i),
            )  # fmt: skip
        gdc_launch_dependents()
        gdc_wait()
        for i in gl.static_range(STAGES):
            tma.async_copy_global_to_shared(
                rows, [0, begin + i * FEATURES], ready.index(i), row_ring.index(i)
            )
        depth: gl.constexpr = 256 // rows.dtype.primitive_bitwidth
        layout: gl.constexpr = gl.NVMMADistributedLayout(
            version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, ROWS, depth]
        )
        total = gl.zeros((OUTPUTS, ROWS), gl.float32, layout)
        all_steps = steps
        if MANY:
            all_steps = gl.cdiv(num_tiles - tile, num_programs) * steps
        k = 0  # of the tile
        later_tile = tile  # whose features from later_k on fill the ring next
        later_k = STAGES
        if MANY and later_k == steps:
            later_tile += num_programs
            later_k = 0
        for step in range(all_steps):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
            total = warpgroup_mma(
                column_ring.index(stage), row_ring.index(stage).permute((1, 0)), total,
                use_acc=k > 0, is_async=True,
            )  # fmt: skip
            total = warpgroup_mma_wait(num_outstanding=1, deps=(total,))
            # every warp has ended the product before this one: its tiles' places can be filled
            gl.thread_barrier()
            wanted = (step > 0) & (step - 1 + STAGES < all_steps)
            free = (step + STAGES - 1) % STAGES
            mbarrier.expect(ready.index(free), num_bytes, pred=wanted)
            tma.async_copy_global_to_shared(
                columns, [later_tile * OUTPUTS, begin + later_k * FEATURES], ready.index(free),
                column_ring.index(free), pred=wanted,
            )  # fmt: skip
            tma.async_copy_global_to_shared(
                rows, [0, begin + later_k * FEATURES], ready.index(free), row_ring.index(free),
                pred=wanted,
            )  # fmt: skip
            if step > 0:
                later_k += 1
            k += 1
            if MANY:
                if later_k == steps:
                    later_tile += num_programs
                    later_k = 0
                if k == steps:
                    total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
                    _finish(
                        total, tile * OUTPUTS, split, parts, row_scales, column_scales,
                        keys, values, positions, places, table, bias, num_rows, num_outputs,
                        layout, GATED, H, KV, HALF, num_warps,
                    )  # fmt: skip
                    tile += num_programs
                    k = 0
        if not MANY:
            total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
            _finish(
                total, tile * OUTPUTS, split, parts, row_scales, column_scales,
                keys, values, positions, places, table, bias, num_rows, num_outputs,
                layout, GATED, H, KV, HALF, num_warps,
            )  # fmt: skip

    @gluon.jit
    def _finish(
        total, first_output, split, parts, row_scales, column_scales,
        keys, values, positions, places, table, bias, num_rows, num_outputs,
        layout: gl.constexpr, GATED: gl.constexpr, H: gl.constexpr, KV: gl.constexpr,
        HALF: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        OUTPUTS: gl.constexpr = total.shape[0]
        ROWS: gl.constexpr = total.shape[1]
        if column_scales is not None:
            output = first_output + gl.arange(0, OUTPUTS, gl.SliceLayout(1, layout))
            total = total * gl.load(column_scales + output)[:, None]
        if row_scales is not None:
            row = gl.arange(0, ROWS, gl.SliceLayout(0, layout))
            factor = gl.load(row_scales + row, mask=row < num_rows, other=0.0)
            total = total * factor[None, :]
        # by rows, as memory has it: 16 outputs to a thread, which are 8 of one half of a pair (gate
        # and up, or what turns together) and their 8 others
        wide: gl.constexpr = gl.BlockedLayout(
            [1, 16], [512 // OUTPUTS, OUTPUTS // 16], [num_warps, 1], [1, 0]
        )
        half: gl.constexpr = gl.BlockedLayout(
            [1, 8], [512 // OUTPUTS, OUTPUTS // 16], [num_warps, 1], [1, 0]
        )
        value = gl.convert_layout(gl.permute(total.to(parts.dtype.element_ty), (1, 0)), wide)
        if not GATED and HALF == 0:
            _store(parts, value, first_output, split, num_rows, num_outputs, wide)
        else:
            pairs = gl.reshape(value, (ROWS, OUTPUTS // 16, 2, 8))
            first, second = gl.split(gl.permute(pairs, (0, 1, 3, 2)))
            first = gl.convert_layout(gl.reshape(first, (ROWS, OUTPUTS // 2)), half)
            second = gl.convert_layout(gl.reshape(second, (ROWS, OUTPUTS // 2)), half)
            first, second = first.to(gl.float32), second.to(gl.float32)
            if GATED:
                gated = first * second / (1.0 + gl.exp(-first))
                _store(
                    parts, gated.to(value.dtype), first_output // 2, split, num_rows,
                    num_outputs // 2, half,
                )  # fmt: skip
            else:
                _rotate(
                    first, second, first_output, parts, keys, values, positions, places, table,
                    bias, num_rows, half, H, KV, HALF,
                )  # fmt: skip

    @gluon.jit
    def _store(parts, value, first_output, split, num_rows, num_outputs, layout: gl.constexpr):
        row = gl.arange(0, value.shape[0], gl.SliceLayout(1, layout))
        output = first_output + gl.arange(0, value.shape[1], gl.SliceLayout(0, layout))
        at = (split * num_rows + row).to(gl.int64)[:, None] * num_outputs + output[None, :]
        gl.store(parts + at, value, mask=(row < num_rows)[:, None])

    @gluon.jit
    def _rotate(
        first, second, first_output, query, keys, values, positions, places, table, bias, num_rows,
        layout: gl.constexpr, H: gl.constexpr, KV: gl.constexpr, HALF: gl.constexpr,
    ):  # fmt: skip
        row = gl.arange(0, first.shape[0], gl.SliceLayout(1, layout))
        pair = first_output // 2 + gl.arange(0, first.shape[1], gl.SliceLayout(0, layout))
        head, dim = pair // HALF, pair % HALF
        kind: gl.constexpr = query.dtype.element_ty
        if bias is not None:
            source = bias + pair // 8 * 16 + pair % 8
            first = first + gl.load(source).to(gl.float32)[None, :]
            second = second + gl.load(source + 8).to(gl.float32)[None, :]
        # a tile holds queries, keys or values alone
        if first_output < (H + KV) * 2 * HALF:
            position = gl.load(positions + row, mask=row < num_rows, other=0).to(gl.int64)
            angle = table + (position * (2 * HALF))[:, None] + dim[None, :]
            cos, sin = gl.load(angle), gl.load(angle + HALF)
            turned = first * cos - second * sin
            second = second * cos + first * sin
            first = turned
        if first_output < H * 2 * HALF:
            at = row.to(gl.int64)[:, None] * (H * 2 * HALF) + (head * 2 * HALF + dim)[None, :]
            inside = (row < num_rows)[:, None]
            gl.store(query + at, first.to(kind), mask=inside)
            gl.store(query + at + HALF, second.to(kind), mask=inside)
        else:
            place = gl.load(places + row, mask=row < num_rows, other=-1).to(gl.int64)
            at = place[:, None] * (KV * 2 * HALF) + ((head - H) * 2 * HALF + dim)[None, :]
            inside = (place >= 0)[:, None]
            if first_output < (H + KV) * 2 * HALF:
                gl.store(keys + at, first.to(kind), mask=inside)
                gl.store(keys + at + HALF, second.to(kind), mask=inside)
            else:
                at -= KV * 2 * HALF
                gl.store(values + at, first.to(kind), mask=inside)
                gl.store(values + at + HALF, second.to(kind), mask=inside)
