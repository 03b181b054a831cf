"""The product of `skinny`, with the weight's first tiles under way before its rows exist.

Between two products lie small kernels and the latencies of launches and first loads, in which the
memory stands idle. Weights depend on no kernel, so each program fills its ring of weight tiles
before it waits for the kernel in front of it (programmatic dependent launch) and asks for the rows
only then. That order cannot be said in Triton itself; this is Gluon, its lower level. Products of
many tiles run as one program per multiprocessor, whose ring goes on from tile to tile.

What would follow a product and needs nothing but a tile of it happens before the tile is stored
(`epilogue`): the gate of a feed-forward layer, or rotary positions and the way of keys and values
to the pool.

Rows beyond a power of two have sums of their own beside the others, so that 160 rows cost what 128
and 32 do; both read each tile of the weight once.

Hopper only: its matrix instructions read both operands from shared memory.

Shapes: M rows, N outputs, K features, S splits, H query heads, KV key/value heads, hd head size.
"""

import functools

import torch
from torch import Tensor

from d2f_runtime.kernels.activation import Activation
from d2f_runtime.kernels.gluon import (
    HAS_GLUON,
    TensorDescriptor,
    gl,
    gluon,
    mbarrier,
    thread_barrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from d2f_runtime.kernels.language import gdc_launch_dependents, gdc_wait
from d2f_runtime.kernels.rope import Rotation
from d2f_runtime.kernels.skinny import Tiling

__all__ = ["streamed_product", "streamed_rotation"]


def streamed_product(
    x: Activation,
    weight: Tensor,
    weight_scale: Tensor | None,
    *,
    tiling: Tiling,
    dtype: torch.dtype,
    gated: bool = False,
) -> Tensor:
    """Do what `skinny_product_reference` does, on a Hopper GPU, for as many rows as a tile has.

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
    assert num_rows <= tiling.rows + tiling.more
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
        _described(x.values, tiling.more, tiling.features) if tiling.more else None,
        _described(weight, tiling.outputs, tiling.features),
        out, x.scale, weight_scale, *((None,) * 6 if rotation is None else rotation[:6]),
        num_rows, num_outputs, steps, num_tiles,
        ROWS=tiling.rows, MORE=tiling.more, OUTPUTS=tiling.outputs, FEATURES=tiling.features,
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
    from d2f_runtime.kernels.epilogue import finish

    @gluon.jit
    def _streamed(
        rows, more_rows, columns, parts, row_scales, column_scales,
        keys, values, positions, places, table, bias, num_rows, num_outputs, steps, num_tiles,
        ROWS: gl.constexpr, MORE: gl.constexpr, OUTPUTS: gl.constexpr, FEATURES: gl.constexpr,
        STAGES: gl.constexpr, MANY: gl.constexpr, GATED: gl.constexpr, H: gl.constexpr,
        KV: gl.constexpr, HALF: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        tile = gl.program_id(0)
        num_programs = gl.num_programs(0)
        split = gl.program_id(1)
        begin = split * steps * FEATURES
        kind: gl.constexpr = rows.dtype
        num_bytes: gl.constexpr = (ROWS + MORE + OUTPUTS) * FEATURES * kind.primitive_bitwidth // 8
        row_ring = gl.allocate_shared_memory(kind, [STAGES, ROWS, FEATURES], rows.layout)
        column_ring = gl.allocate_shared_memory(
            columns.dtype, [STAGES, OUTPUTS, FEATURES], columns.layout
        )
        more_ring = row_ring
        if MORE:
            more_ring = gl.allocate_shared_memory(kind, [STAGES, MORE, FEATURES], more_rows.layout)
        ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(ready.index(i), count=1)
        depth: gl.constexpr = 256 // kind.primitive_bitwidth
        layout: gl.constexpr = gl.NVMMADistributedLayout(
            version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, ROWS, depth]
        )
        more_layout: gl.constexpr = gl.NVMMADistributedLayout(
            version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, MORE or 16, depth]
        )
        for i in gl.static_range(STAGES):  # a tile has at least so many steps
            mbarrier.expect(ready.index(i), num_bytes)
            _ask(columns, column_ring, ready, tile * OUTPUTS, begin + i * FEATURES, i, True)
        gdc_launch_dependents()
        gdc_wait()
        for i in gl.static_range(STAGES):
            _ask(rows, row_ring, ready, 0, begin + i * FEATURES, i, True)
            if MORE:
                _ask(more_rows, more_ring, ready, ROWS, begin + i * FEATURES, i, True)
        SCALED: gl.constexpr = row_scales is not None
        column_factor, row_factor, more_factor = 0, 0, 0
        if SCALED:  # they come while the product runs: at its end they would be waited for
            column_factor = _column_factor(column_scales, tile, num_tiles, OUTPUTS, layout)
            row_factor = _row_factor(row_scales, 0, num_rows, ROWS, layout)
            if MORE:
                more_factor = _row_factor(row_scales, ROWS, num_rows, MORE, more_layout)
        total = gl.zeros((OUTPUTS, ROWS), gl.float32, layout)
        others = gl.zeros((OUTPUTS, MORE or 16), gl.float32, more_layout)
        ends = (parts, keys, values, positions, places, table, bias)
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
            left = column_ring.index(stage)
            total = warpgroup_mma(
                left, row_ring.index(stage).permute((1, 0)), total, use_acc=k > 0, is_async=True
            )
            if MORE:
                others = warpgroup_mma(
                    left, more_ring.index(stage).permute((1, 0)), others, use_acc=k > 0,
                    is_async=True,
                )  # fmt: skip
                total, others = warpgroup_mma_wait(num_outstanding=2, deps=(total, others))
            else:
                total = warpgroup_mma_wait(num_outstanding=1, deps=(total,))
            # every warp has ended the product before this one: its tiles' places can be filled
            thread_barrier()
            wanted = (step > 0) & (step - 1 + STAGES < all_steps)
            free = (step + STAGES - 1) % STAGES
            feature = begin + later_k * FEATURES
            mbarrier.expect(ready.index(free), num_bytes, pred=wanted)
            _ask(columns, column_ring, ready, later_tile * OUTPUTS, feature, free, wanted)
            _ask(rows, row_ring, ready, 0, feature, free, wanted)
            if MORE:
                _ask(more_rows, more_ring, ready, ROWS, feature, free, wanted)
            if step > 0:
                later_k += 1
            k += 1
            if MANY:
                if later_k == steps:
                    later_tile += num_programs
                    later_k = 0
                if k == steps:
                    _end(
                        total, others, column_factor, row_factor, more_factor, tile * OUTPUTS,
                        split, ends, num_rows, num_outputs, SCALED, MORE, GATED, H, KV, HALF,
                        num_warps,
                    )  # fmt: skip
                    tile += num_programs
                    if SCALED:
                        column_factor = _column_factor(
                            column_scales, tile, num_tiles, OUTPUTS, layout
                        )
                    k = 0
        if not MANY:
            _end(
                total, others, column_factor, row_factor, more_factor, tile * OUTPUTS,
                split, ends, num_rows, num_outputs, SCALED, MORE, GATED, H, KV, HALF, num_warps,
            )  # fmt: skip

    @gluon.jit
    def _ask(matrix, ring, ready, first, feature, stage, wanted):
        """Let a tile of a matrix fill its place of a stage."""
        tma.async_copy_global_to_shared(
            matrix, [first, feature], ready.index(stage), ring.index(stage), pred=wanted
        )

    @gluon.jit
    def _column_factor(scales, tile, num_tiles, OUTPUTS: gl.constexpr, layout: gl.constexpr):
        """Return the scales of a tile's outputs; of the last tile where there is none."""
        output = gl.minimum(tile, num_tiles - 1) * OUTPUTS
        return gl.load(scales + output + gl.arange(0, OUTPUTS, gl.SliceLayout(1, layout)))

    @gluon.jit
    def _row_factor(scales, first, num_rows, ROWS: gl.constexpr, layout: gl.constexpr):
        row = first + gl.arange(0, ROWS, gl.SliceLayout(0, layout))
        return gl.load(scales + row, mask=row < num_rows, other=0.0)

    @gluon.jit
    def _end(
        total, others, column_factor, row_factor, more_factor, first_output, split, ends,
        num_rows, num_outputs, SCALED: gl.constexpr, MORE: gl.constexpr, GATED: gl.constexpr,
        H: gl.constexpr, KV: gl.constexpr, HALF: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        """Wait for the last products of a tile and store what becomes of them."""
        if MORE:
            total, others = warpgroup_mma_wait(num_outstanding=0, deps=(total, others))
            finish(
                others, column_factor, more_factor, total.shape[1], first_output, split, ends,
                num_rows, num_outputs, SCALED, GATED, H, KV, HALF, num_warps,
            )  # fmt: skip
        else:
            total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
        finish(
            total, column_factor, row_factor, 0, first_output, split, ends,
            num_rows, num_outputs, SCALED, GATED, H, KV, HALF, num_warps,
        )  # fmt: skip
