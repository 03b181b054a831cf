"""The product of few rows with a weight of 4 or 8 bits, which becomes bf16 in registers alone.

Codes lie in memory as the matrix units of Hopper take their first operand (`fragments`), so each
thread loads 16 bytes at a time, turns them into the very registers that the next matrix instruction
reads, and nothing but the rows passes through shared memory. The codes of the steps ahead are under
way while a step computes, those of the first steps before the kernel in front has ended.

4 bits are multiplied by their block's scale at once, 8 bits by their output's scale after the sum.

Hopper only. Shapes: M rows, N outputs, K features, S splits.
"""

import torch
from torch import Tensor

from d2f_runtime.kernels.fragments import TILE, PackedCodes
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
from d2f_runtime.kernels.low_bit_tiling import STRIDES, LowBitTiling

__all__ = ["streamed_low_bit_product"]


def streamed_low_bit_product(
    x: Tensor, weight: PackedCodes, *, tiling: LowBitTiling, dtype: torch.dtype, gated: bool = False
) -> Tensor:
    """Return [S, M, N] parts of `dtype` whose sum over S is x times the weight's transpose.

    Args:
        x: [M, K or less] bf16; features that it lacks count as zero.
        weight: [N, K]; N must be a multiple of the tiling's outputs.
        tiling: S is its number of splits.
        dtype: of the parts.
        gated: the outputs are gates and ups as `gate.interleave` lays them, S is 1, and the result
            is [1, M, N / 2] of what `gate.silu_gate` makes of them.
    """
    num_rows = x.shape[0]
    num_outputs, num_features = weight.shape
    shape = (tiling.splits, num_rows, num_outputs // 2 if gated else num_outputs)
    parts = torch.empty(shape, device=x.device, dtype=dtype)
    assert num_rows <= tiling.rows + tiling.more
    scales = weight.scales.view(torch.int32) if weight.bits == 4 else weight.scales
    steps = num_features // STRIDES[weight.bits]
    _streamed[(num_outputs // tiling.outputs, tiling.splits)](
        _described(x, tiling.rows), _described(x, tiling.more) if tiling.more else None,
        weight.words, scales, parts, num_rows, num_outputs, steps, -(-steps // tiling.splits),
        ROWS=tiling.rows, MORE=tiling.more, OUTPUTS=tiling.outputs, STAGES=tiling.stages,
        AHEAD=tiling.ahead, BITS=weight.bits, GATED=gated, num_warps=tiling.warps, launch_pdl=True,
    )  # fmt: skip
    return parts


def _described(x: Tensor, rows: int) -> "TensorDescriptor":
    block = [rows, TILE]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return TensorDescriptor.from_tensor(x, block, layout)


if HAS_GLUON:
    from d2f_runtime.kernels.operands import operand_of_4, operand_of_8, quarters_of

    @gluon.constexpr_function
    def _word_layout(groups, warps):
        """The layout of `groups` times 2,048 words: 16 bytes of each 512 words to a thread."""
        registers, owners = [[1], [2], [512], [1024]], [[128], [256]]
        over = [[2048 << bit] for bit in range(groups.bit_length() - 1)]
        spread = (warps // 4).bit_length() - 1
        owners, registers = owners + over[:spread], registers + over[spread:]
        lanes = [[4], [8], [16], [32], [64]]
        return gl.DistributedLinearLayout(registers, lanes, owners, [], [groups * 2048])

    @gluon.constexpr_function
    def _scale_layout(groups, warps):
        """The layout of `groups` times 128 words of scales; four threads own the same."""
        registers, owners = [[1], [2]], [[32], [64]]
        over = [[128 << bit] for bit in range(groups.bit_length() - 1)]
        spread = (warps // 4).bit_length() - 1
        owners, registers = owners + over[:spread], registers + over[spread:]
        lanes = [[0], [0], [4], [8], [16]]
        return gl.DistributedLinearLayout(registers, lanes, owners, [], [groups * 128])

    @gluon.jit
    def _streamed(
        rows, more_rows, words, scales, parts, num_rows, num_outputs, all_steps, share,
        ROWS: gl.constexpr, MORE: gl.constexpr, OUTPUTS: gl.constexpr, STAGES: gl.constexpr,
        AHEAD: gl.constexpr, BITS: gl.constexpr, GATED: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        FEATURES: gl.constexpr = 64
        TILES: gl.constexpr = 4 if BITS == 4 else 2
        GROUPS: gl.constexpr = OUTPUTS // 64
        first_group = gl.program_id(0) * GROUPS
        split = gl.program_id(1)
        begin = split * share
        steps = gl.minimum(share, all_steps - begin)
        num_tiles = steps * TILES
        ring = gl.allocate_shared_memory(rows.dtype, [STAGES, ROWS, FEATURES], rows.layout)
        more_ring = ring
        if MORE:
            more_ring = gl.allocate_shared_memory(
                rows.dtype, [STAGES, MORE, FEATURES], more_rows.layout
            )
        ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(ready.index(i), count=1)
        at = gl.arange(0, GROUPS * 2048, _word_layout(GROUPS, num_warps))
        at = at // 2048 * (all_steps * 2048) + at % 2048
        word_from = words + (first_group * all_steps + begin) * 2048
        now = _ahead(word_from + at, 0, steps, 2048)
        if AHEAD == 2:
            soon = _ahead(word_from + at, 1, steps, 2048)
        if BITS == 4:
            scale_at = gl.arange(0, GROUPS * 128, _scale_layout(GROUPS, num_warps))
            scale_at = scale_at // 128 * (all_steps * 128) + scale_at % 128
            scale_from = scales + (first_group * all_steps + begin) * 128
            scale_now = _ahead(scale_from + scale_at, 0, steps, 128)
            if AHEAD == 2:
                scale_soon = _ahead(scale_from + scale_at, 1, steps, 128)
        gdc_launch_dependents()
        gdc_wait()
        for i in gl.static_range(STAGES):
            _ask(rows, more_rows, ring, more_ring, ready, begin * TILES + i, i, i < num_tiles, MORE)
        layout: gl.constexpr = gl.NVMMADistributedLayout(
            version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, ROWS, 16]
        )
        more_layout: gl.constexpr = gl.NVMMADistributedLayout(
            version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, MORE or 16, 16]
        )
        more_operand: gl.constexpr = gl.DotOperandLayout(0, more_layout, 2)
        total = gl.zeros((OUTPUTS, ROWS), gl.float32, layout)
        others = gl.zeros((OUTPUTS, MORE or 16), gl.float32, more_layout)
        for step in range(steps):
            later = _ahead(word_from + at, step + AHEAD, steps, 2048)
            quarters = quarters_of(now, GROUPS, 512)
            if BITS == 4:
                scale_later = _ahead(scale_from + scale_at, step + AHEAD, steps, 128)
                factors = quarters_of(gl.reshape(scale_now, (GROUPS * 32, 4)), GROUPS, 32)
            for i in gl.static_range(TILES):
                if BITS == 4:
                    left = operand_of_4(quarters[i], factors[i], GROUPS, layout)
                else:
                    left = operand_of_8(quarters[2 * i], quarters[2 * i + 1], GROUPS, layout)
                number = step * TILES + i
                stage = number % STAGES
                mbarrier.wait(ready.index(stage), (number // STAGES) & 1)
                total = warpgroup_mma(left, ring.index(stage).permute((1, 0)), total, is_async=True)
                if MORE:
                    same = gl.convert_layout(left, more_operand, assert_trivial=True)
                    others = warpgroup_mma(
                        same, more_ring.index(stage).permute((1, 0)), others, is_async=True
                    )
                if i == 0:
                    before = left
                else:
                    # the next tile's codes are unpacked while this one's product runs
                    if MORE:
                        total, others, _ = warpgroup_mma_wait(
                            num_outstanding=2, deps=(total, others, before)
                        )
                    else:
                        total, _ = warpgroup_mma_wait(num_outstanding=1, deps=(total, before))
                    _refill(
                        rows, more_rows, ring, more_ring, ready, begin * TILES, number - 1,
                        num_tiles, MORE,
                    )  # fmt: skip
                before = left
            if MORE:
                total, others, _ = warpgroup_mma_wait(
                    num_outstanding=0, deps=(total, others, before)
                )
            else:
                total, _ = warpgroup_mma_wait(num_outstanding=0, deps=(total, before))
            _refill(
                rows, more_rows, ring, more_ring, ready, begin * TILES, step * TILES + TILES - 1,
                num_tiles, MORE,
            )  # fmt: skip
            if AHEAD == 2:
                now = soon
                soon = later
            else:
                now = later
            if BITS == 4:
                if AHEAD == 2:
                    scale_now = scale_soon
                    scale_soon = scale_later
                else:
                    scale_now = scale_later
        first_output = first_group * 64
        if BITS == 8:
            output = first_output + gl.arange(0, OUTPUTS, gl.SliceLayout(1, layout))
            total = total * gl.load(scales + output)[:, None]
            if MORE:
                output = first_output + gl.arange(0, OUTPUTS, gl.SliceLayout(1, more_layout))
                others = others * gl.load(scales + output)[:, None]
        if MORE:
            _finish(
                others, parts, ROWS, first_output, split, num_rows, num_outputs, GATED, num_warps
            )
        _finish(total, parts, 0, first_output, split, num_rows, num_outputs, GATED, num_warps)

    @gluon.jit
    def _ahead(places, step, steps, SIZE: gl.constexpr):
        """Ask for a step's words; they arrive while earlier steps compute."""
        wanted = gl.full([places.shape[0]], step < steps, gl.int1, places.type.layout)
        return gl.load(places + step * SIZE, mask=wanted, other=0, eviction_policy="evict_first")

    @gluon.jit
    def _refill(
        rows, more_rows, ring, more_ring, ready, first_tile, number, num_tiles, MORE: gl.constexpr
    ):
        """Ask for the rows that take the place of a tile that every warp has done with."""
        STAGES: gl.constexpr = ring.shape[0]
        thread_barrier()
        later = number + STAGES
        _ask(
            rows, more_rows, ring, more_ring, ready, first_tile + later, number % STAGES,
            later < num_tiles, MORE,
        )  # fmt: skip

    @gluon.jit
    def _ask(
        rows, more_rows, ring, more_ring, ready, tile, stage, wanted, MORE: gl.constexpr
    ):  # fmt: skip
        """Let the rows of a tile of 64 features fill a stage."""
        num_bytes: gl.constexpr = (ring.shape[1] + MORE) * 128
        mbarrier.expect(ready.index(stage), num_bytes, pred=wanted)
        tma.async_copy_global_to_shared(
            rows, [0, tile * 64], ready.index(stage), ring.index(stage), pred=wanted
        )
        if MORE:
            tma.async_copy_global_to_shared(
                more_rows, [ring.shape[1], tile * 64], ready.index(stage), more_ring.index(stage),
                pred=wanted,
            )  # fmt: skip

    @gluon.jit
    def _finish(
        total, parts, first_row, first_output, split, num_rows, num_outputs,
        GATED: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        """Store a tile of sums, or what the gate makes of them; see `streamed`."""
        OUTPUTS: gl.constexpr = total.shape[0]
        ROWS: gl.constexpr = total.shape[1]
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
            value = gl.convert_layout(half, narrow)
            first_output, num_outputs = first_output // 2, num_outputs // 2
        at: gl.constexpr = value.type.layout
        row = first_row + gl.arange(0, value.shape[0], gl.SliceLayout(1, at))
        output = first_output + gl.arange(0, value.shape[1], gl.SliceLayout(0, at))
        place = (split * num_rows + row).to(gl.int64)[:, None] * num_outputs + output[None, :]
        gl.store(parts + place, value, mask=(row < num_rows)[:, None])
