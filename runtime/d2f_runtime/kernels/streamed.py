"""The product of `skinny`, with the weight's first tiles under way before its rows exist.

Between two products lie small kernels and the latencies of launches and first loads, in which the
memory stands idle. Weights depend on no kernel, so each program fills its ring of weight tiles
before it waits for the kernel in front of it (programmatic dependent launch) and asks for the rows
only then. That order cannot be said in Triton itself; this is Gluon, its lower level.

Hopper only: its matrix instructions read both operands from shared memory.

Shapes: M rows, N outputs, K features, S splits.
"""

import torch
from torch import Tensor

from d2f_runtime.kernels.activation import Activation
from d2f_runtime.kernels.language import gdc_launch_dependents, gdc_wait
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

__all__ = ["HAS_GLUON", "streamed_product"]


def streamed_product(
    x: Activation,
    weight: Tensor,
    weight_scale: Tensor | None,
    *,
    tiling: Tiling,
    dtype: torch.dtype,
    gated: bool = False,
) -> Tensor:
    """Do what `skinny_product_reference` does, on a Hopper GPU.

    With `gated` the outputs are gates and ups as `gate.interleave` lays them, S is 1, and the
    result is [1, M, N / 2] of what `gate.silu_gate` makes of them.
    """
    num_rows, num_features = x.values.shape
    num_outputs = weight.shape[0]
    shape = (tiling.splits, num_rows, num_outputs // 2 if gated else num_outputs)
    parts = torch.empty(shape, device=weight.device, dtype=dtype)
    kind = gl.bfloat16 if weight.dtype == torch.bfloat16 else gl.float16
    if weight.element_size() == 1:
        kind = gl.float8e4nv
    row_block, column_block = [tiling.rows, tiling.features], [tiling.outputs, tiling.features]
    rows = TensorDescriptor.from_tensor(
        x.values, row_block, gl.NVMMASharedLayout.get_default_for(row_block, kind)
    )
    columns = TensorDescriptor.from_tensor(
        weight, column_block, gl.NVMMASharedLayout.get_default_for(column_block, kind)
    )
    grid = (num_outputs // tiling.outputs, tiling.splits, -(-num_rows // tiling.rows))
    _streamed[grid](
        rows, columns, parts, x.scale, weight_scale, num_rows, num_outputs,
        num_features // tiling.splits // tiling.features,
        ROWS=tiling.rows, OUTPUTS=tiling.outputs, FEATURES=tiling.features, STAGES=tiling.stages,
        GATED=gated, num_warps=tiling.warps, launch_pdl=True,
    )  # fmt: skip
    return parts


if HAS_GLUON:

    @gluon.jit
    def _streamed(
        rows, columns, parts, row_scales, column_scales, num_rows, num_outputs, steps,
        ROWS: gl.constexpr, OUTPUTS: gl.constexpr, FEATURES: gl.constexpr, STAGES: gl.constexpr,
        GATED: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        first_output = gl.program_id(0) * OUTPUTS
        split = gl.program_id(1)
        first_row = gl.program_id(2) * ROWS
        begin = split * steps * FEATURES
        num_bytes: gl.constexpr = rows.block_type.nbytes + columns.block_type.nbytes
        row_ring = gl.allocate_shared_memory(rows.dtype, [STAGES, ROWS, FEATURES], rows.layout)
        column_ring = gl.allocate_shared_memory(
            columns.dtype, [STAGES, OUTPUTS, FEATURES], columns.layout
        )
        ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(ready.index(i), count=1)
        for i in gl.static_range(STAGES):
            mbarrier.expect(ready.index(i), num_bytes, pred=i < steps)
            tma.async_copy_global_to_shared(
                columns, [first_output, begin + i * FEATURES], ready.index(i),
                column_ring.index(i), pred=i < steps,
            )  # fmt: skip
        gdc_launch_dependents()
        gdc_wait()
        for i in gl.static_range(STAGES):
            tma.async_copy_global_to_shared(
                rows, [first_row, begin + i * FEATURES], ready.index(i),
                row_ring.index(i), pred=i < steps,
            )  # fmt: skip
        depth: gl.constexpr = 256 // rows.dtype.primitive_bitwidth
        layout: gl.constexpr = gl.NVMMADistributedLayout(
            version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, ROWS, depth]
        )
        total = gl.zeros((OUTPUTS, ROWS), gl.float32, layout)
        for step in range(steps):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
            total = warpgroup_mma(
                column_ring.index(stage), row_ring.index(stage).permute((1, 0)), total,
                is_async=True,
            )  # fmt: skip
            total = warpgroup_mma_wait(num_outstanding=1, deps=(total,))
            # every warp has ended the product before this one: its tiles' places can be filled
            gl.thread_barrier()
            later = step - 1 + STAGES
            wanted = (step > 0) & (later < steps)
            free = (step + STAGES - 1) % STAGES
            mbarrier.expect(ready.index(free), num_bytes, pred=wanted)
            tma.async_copy_global_to_shared(
                columns, [first_output, begin + later * FEATURES], ready.index(free),
                column_ring.index(free), pred=wanted,
            )  # fmt: skip
            tma.async_copy_global_to_shared(
                rows, [first_row, begin + later * FEATURES], ready.index(free),
                row_ring.index(free), pred=wanted,
            )  # fmt: skip
        total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
        if column_scales is not None:
            output = first_output + gl.arange(0, OUTPUTS, gl.SliceLayout(1, layout))
            total = total * gl.load(column_scales + output)[:, None]
        if row_scales is not None:
            row = first_row + gl.arange(0, ROWS, gl.SliceLayout(0, layout))
            factor = gl.load(row_scales + row, mask=row < num_rows, other=0.0)
            total = total * factor[None, :]
        # by rows, as memory has it: 16 outputs to a thread, which are 8 gates and their 8 ups
        wide: gl.constexpr = gl.BlockedLayout(
            [1, 16], [512 // OUTPUTS, OUTPUTS // 16], [num_warps, 1], [1, 0]
        )
        value = gl.convert_layout(gl.permute(total.to(parts.dtype.element_ty), (1, 0)), wide)
        if GATED:
            pairs = gl.reshape(value, (ROWS, OUTPUTS // 16, 2, 8))
            gate, up = gl.split(gl.permute(pairs, (0, 1, 3, 2)))
            gate, up = gate.to(gl.float32), up.to(gl.float32)
            gated = gate * up / (1.0 + gl.exp(-gate))
            half = gl.reshape(gated.to(parts.dtype.element_ty), (ROWS, OUTPUTS // 2))
            narrow: gl.constexpr = gl.BlockedLayout(
                [1, 8], [512 // OUTPUTS, OUTPUTS // 16], [num_warps, 1], [1, 0]
            )
            _store(
                parts, gl.convert_layout(half, narrow), first_row, first_output // 2, split,
                num_rows, num_outputs // 2, narrow,
            )  # fmt: skip
        else:
            _store(parts, value, first_row, first_output, split, num_rows, num_outputs, wide)

    @gluon.jit
    def _store(
        parts, value, first_row, first_output, split, num_rows, num_outputs, layout: gl.constexpr
    ):
        row = first_row + gl.arange(0, value.shape[0], gl.SliceLayout(1, layout))
        output = first_output + gl.arange(0, value.shape[1], gl.SliceLayout(0, layout))
        at = (split * num_rows + row).to(gl.int64)[:, None] * num_outputs + output[None, :]
        gl.store(parts + at, value, mask=(row < num_rows)[:, None])
