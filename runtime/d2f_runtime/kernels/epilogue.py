"""What becomes of a tile of a product before it is stored: scales, gate, rotary positions.

Hopper only, as `streamed`, whose programs call this.

Shapes: H query heads, KV key/value heads, HALF of a head's size; a tile is [OUTPUTS, ROWS].
"""

from d2f_runtime.kernels.gluon import (
    HAS_GLUON,
    gl,
    gluon,
)

__all__ = ["finish"]

if HAS_GLUON:

    @gluon.jit
    def finish(
        total, column_factor, row_factor, first_row, first_output, split, ends, num_rows,
        num_outputs, SCALED: gl.constexpr, GATED: gl.constexpr, H: gl.constexpr, KV: gl.constexpr,
        HALF: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        """Store a tile of sums: as it is, gated (GATED), or rotated and to the pool (HALF > 0)."""
        parts, keys, values, positions, places, table, bias = ends
        OUTPUTS: gl.constexpr = total.shape[0]
        ROWS: gl.constexpr = total.shape[1]
        if SCALED:
            beside: gl.constexpr = gl.SliceLayout(1, total.type.layout)
            total = total * gl.convert_layout(column_factor, beside)[:, None] * row_factor[None, :]
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
            _store(parts, value, first_row, first_output, split, num_rows, num_outputs, wide)
        else:
            pairs = gl.reshape(value, (ROWS, OUTPUTS // 16, 2, 8))
            first, second = gl.split(gl.permute(pairs, (0, 1, 3, 2)))
            first = gl.convert_layout(gl.reshape(first, (ROWS, OUTPUTS // 2)), half)
            second = gl.convert_layout(gl.reshape(second, (ROWS, OUTPUTS // 2)), half)
            first, second = first.to(gl.float32), second.to(gl.float32)
            if GATED:
                gated = first * second / (1.0 + gl.exp(-first))
                _store(
                    parts, gated.to(value.dtype), first_row, first_output // 2, split, num_rows,
                    num_outputs // 2, half,
                )  # fmt: skip
            else:
                _rotate(
                    first, second, first_row, first_output, parts, keys, values, positions, places,
                    table, bias, num_rows, half, H, KV, HALF,
                )  # fmt: skip

    @gluon.jit
    def _store(
        parts, value, first_row, first_output, split, num_rows, num_outputs, layout: gl.constexpr
    ):
        row = first_row + gl.arange(0, value.shape[0], gl.SliceLayout(1, layout))
        output = first_output + gl.arange(0, value.shape[1], gl.SliceLayout(0, layout))
        at = (split * num_rows + row).to(gl.int64)[:, None] * num_outputs + output[None, :]
        gl.store(parts + at, value, mask=(row < num_rows)[:, None])

    @gluon.jit
    def _rotate(
        first, second, first_row, first_output, query, keys, values, positions, places, table, bias,
        num_rows, layout: gl.constexpr, H: gl.constexpr, KV: gl.constexpr,
        HALF: gl.constexpr,
    ):  # fmt: skip
        row = first_row + gl.arange(0, first.shape[0], gl.SliceLayout(1, layout))
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
