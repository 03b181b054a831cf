"""The products of a mixture of experts, which read only the experts that rows chose.

One program takes a tile of outputs of one expert and all its rows, a tile of rows after the other,
so that a weight is read from memory once, and of an expert without rows nothing is read; where
there are many rows, several programs share them, and find the weight in the cache. The first
product gates at once; the second leaves one part for each choice of a row, already weighted, for
the norm that follows to add. Weights of 4 and 8 bits become 16 bits in registers alone.

Shapes: M rows, D hidden size, F size of an expert, P = C + A choices of a row; E experts.
"""

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from d2f_runtime.kernels.activation import FP8
from d2f_runtime.kernels.expert_codes import add_codes, rows_of
from d2f_runtime.kernels.expert_weights import TILE, ExpertWeights
from d2f_runtime.kernels.fragments import NF4_VALUES
from d2f_runtime.kernels.language import (
    gdc_launch_dependents,
    gdc_wait,
    is_hopper,
    jit,
    overlaps,
    tl,
)
from d2f_runtime.kernels.routing import Routes

__all__ = ["ExpertTiling", "expert_tiling", "through_experts", "through_experts_reference"]


MANY_ROWS = 256  # beyond, experts have more of them than a tile, by and by


@dataclass(frozen=True, slots=True)
class ExpertTiling:
    """How a product is cut: rows, outputs and features of a tile, tiles under way, warps."""

    rows: int
    outputs: int
    features: int
    stages: int
    warps: int = 4


def expert_tiling(num_rows: int, *, bits: int, gated: bool) -> ExpertTiling:
    """Return the tiling to use for so many rows of all experts; a gated tile has twice the outputs.

    An expert has few of the rows: those of 32 rows that each choose 8 experts of 256 go to some 160
    of them. The choices are measured ones (bench/mixture-h200.json), for 32 rows on an H200.
    """
    rows = 16 if num_rows <= 128 else 32 if num_rows <= 512 else 64
    if bits == 4:
        return ExpertTiling(rows, 64, 128, 4 if gated else 3)
    if bits == 8:
        return ExpertTiling(rows, 64, 64, 5)
    if bits == 32:  # for tests
        return ExpertTiling(rows, 64, 32, 3)
    return ExpertTiling(rows, 64, 128, 3) if gated else ExpertTiling(rows, 128, 128, 3, 8)


def through_experts_reference(
    rows: Tensor, routes: Routes, gate_up: ExpertWeights, down: ExpertWeights
) -> Tensor:
    """Return what the experts make of their rows, [P, M, D], to be summed over P.

    Rows that go nowhere are 0, where the kernel leaves them as they are.

    Args:
        rows: [M, D].
        routes: of the rows.
        gate_up: [E, 2 F, D], an expert's gates before its ups.
        down: [E, D, F].
    """
    num_rows, size = rows.shape
    width = routes.chosen.shape[1]
    kind = torch.float64 if rows.dtype == torch.float64 else torch.float32
    out = torch.zeros((num_rows * width, size), dtype=kind, device=rows.device)
    inner = gate_up.shape[1] // 2
    for expert, count in enumerate(routes.counts.tolist()):
        places = routes.places[expert, :count].long()
        x = F.pad(rows[places // width].to(kind), (0, gate_up.shape[2] - size))
        gate, up = (x @ gate_up.of(expert).to(kind).T).split(inner, dim=1)
        wide = F.pad(F.silu(gate) * up, (0, max(0, down.shape[2] - inner)))[:, : down.shape[2]]
        found = (wide @ down.of(expert).to(kind).T)[:, :size]
        out[places] = found * routes.weights.flatten()[places, None].to(kind)
    return out.view(num_rows, width, size).transpose(0, 1).to(rows.dtype)


def through_experts(
    rows: Tensor, routes: Routes, gate_up: ExpertWeights, down: ExpertWeights
) -> Tensor:
    """Do what `through_experts_reference` does."""
    num_rows, size = rows.shape
    width = routes.chosen.shape[1]
    inner = gate_up.shape[1] // 2
    wide = torch.empty((num_rows * width, inner), device=rows.device, dtype=rows.dtype)
    parts = torch.empty((width, num_rows, size), device=rows.device, dtype=rows.dtype)
    _launch(rows, wide, routes, gate_up, inner, gated=True)
    _launch(wide, parts, routes, down, size, gated=False)
    return parts


def _launch(
    x: Tensor, out: Tensor, routes: Routes, weights: ExpertWeights, num_outputs: int, *, gated: bool
) -> None:
    """Run a product; `num_outputs` of an expert are stored, after the gate."""
    num_rows, width = routes.chosen.shape
    num_experts, stored_outputs, stored_size = weights.shape
    bits, size = weights.bits, x.shape[1]
    tiling = expert_tiling(num_rows, bits=bits, gated=gated)
    if bits < 16 and (stored_outputs // 2 if gated else stored_outputs) % tiling.outputs:
        tiling = replace(tiling, outputs=TILE, warps=4)  # codes are there for whole tiles alone
    by_words = bits < 16 and x.dtype == torch.bfloat16 and is_hopper(x.device)
    scales = weights.scales
    table = _values(bits, x.device) if bits < 16 and not by_words else None
    if bits == 4 and scales is not None:
        scales = scales.view(torch.int32)
    even = size % tiling.features == 0 and num_outputs % tiling.outputs == 0
    pdl = overlaps(x.device)
    # of the rows: those that all go to one expert, and those of the others
    wide = -(-num_rows // tiling.rows)  # programs that share them
    rest = -(-2 * num_rows * width // (num_experts * tiling.rows)) if num_rows > MANY_ROWS else 1
    shares = routes.num_always * wide + (num_experts - routes.num_always) * rest
    grid = (-(-num_outputs // tiling.outputs), shares)
    _experts[grid](
        x, weights.values, scales, table, out, routes.places, routes.counts, routes.weights,
        num_rows, num_experts, routes.num_always, wide, rest, width, size, stored_size, num_outputs,
        stored_outputs,
        ROWS=tiling.rows, OUTPUTS=tiling.outputs, FEATURES=tiling.features, BITS=bits,
        BY_WORDS=by_words, GATED=gated, EVEN=even, PDL=pdl,
        num_warps=tiling.warps, num_stages=tiling.stages, launch_pdl=pdl,
    )  # fmt: skip


@functools.cache
def _values(bits: int, device: torch.device) -> Tensor:
    """Return what each code of 4 or 8 bits means, fp32."""
    if bits == 8:
        return torch.arange(256, dtype=torch.uint8, device=device).view(FP8).float()
    return torch.tensor(NF4_VALUES, device=device).bfloat16().float()


@jit
def _experts(
    x, values, scales, table, out, lists, counts, shares, num_rows, num_experts, num_always, wide,
    rest, width, size, stored_size, num_outputs, stored_outputs,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, FEATURES: tl.constexpr, BITS: tl.constexpr,
    BY_WORDS: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    share = tl.program_id(1)
    is_always = share < num_always * wide  # those begin
    sharers = tl.where(is_always, wide, rest)
    share = tl.where(is_always, share, share - num_always * wide)
    expert = share // sharers + tl.where(is_always, num_experts - num_always, 0)
    first_output = tl.program_id(0) * OUTPUTS
    count = tl.load(counts + expert)
    # in words of 32 bits where there are fewer than 16 of a weight
    mine = values + expert.to(tl.int64) * (
        stored_outputs * stored_size // (1 if BITS >= 16 else 32 // BITS)
    )
    factors = scales
    if BITS == 4:
        factors = scales + expert.to(tl.int64) * (stored_outputs * stored_size // 128)
    elif BITS == 8:
        factors = scales + expert * stored_outputs
    for first in range(share % sharers * ROWS, count, sharers * ROWS):
        number = first + tl.arange(0, ROWS)
        inside = number < count
        place = tl.load(lists + expert * num_rows + number, mask=inside, other=0)
        source = x + (place // width if GATED else place) * size
        total, other = _sums(
            source, inside, mine, factors, table, first_output, stored_outputs // 2, size,
            stored_size, num_outputs, OUTPUTS, FEATURES, BITS, BY_WORDS, GATED, EVEN,
        )  # fmt: skip
        output = first_output + tl.arange(0, OUTPUTS)
        if BITS == 8:
            total *= tl.load(factors + output, mask=output < num_outputs, other=0.0)[:, None]
        if GATED:
            if BITS == 8:
                of_ups = factors + stored_outputs // 2 + output
                other *= tl.load(of_ups, mask=output < num_outputs, other=0.0)[:, None]
            total = total * other / (1.0 + tl.exp(-total))
            at = place * num_outputs
        else:
            total *= tl.load(shares + place, mask=inside, other=0.0)[None, :]
            at = (place % width * num_rows + place // width) * num_outputs
        to = out + at[:, None] + output[None, :]
        value = tl.trans(total).to(out.dtype.element_ty)
        tl.store(to, value, mask=inside[:, None] & (output < num_outputs)[None, :])


@jit
def _sums(
    source, inside, values, scales, table, first_output, pair, size, stored_size, num_outputs,
    OUTPUTS: tl.constexpr, FEATURES: tl.constexpr, BITS: tl.constexpr, BY_WORDS: tl.constexpr,
    GATED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Return [OUTPUTS, ROWS] fp32 twice: of the outputs, and where GATED of those a pair away."""
    total = tl.zeros((OUTPUTS, source.shape[0]), dtype=tl.float32)
    other = total
    for first in range(0, size, FEATURES):
        if BITS < 16:
            total = add_codes(
                total, source, inside, values, scales, table, first_output, first, size,
                stored_size, OUTPUTS, BITS, BY_WORDS,
            )  # fmt: skip
            if GATED:
                other = add_codes(
                    other, source, inside, values, scales, table, first_output + pair, first, size,
                    stored_size, OUTPUTS, BITS, BY_WORDS,
                )  # fmt: skip
        else:
            feature = first + tl.arange(0, FEATURES)
            x = rows_of(source, inside, feature, size)
            weight = _tile(values, first_output, feature, size, num_outputs, OUTPUTS, EVEN)
            total = tl.dot(weight, x, total, input_precision="ieee")
            if GATED:
                beside = values + pair * size
                weight = _tile(beside, first_output, feature, size, num_outputs, OUTPUTS, EVEN)
                other = tl.dot(weight, x, other, input_precision="ieee")
    return total, other


@jit
def _tile(values, first, feature, size, num_outputs, OUTPUTS: tl.constexpr, EVEN: tl.constexpr):
    output = first + tl.arange(0, OUTPUTS)
    at = values + output[:, None] * size + feature[None, :]
    if EVEN:
        weight = tl.load(at)
    else:
        weight = tl.load(
            at, mask=(output < num_outputs)[:, None] & (feature < size)[None, :], other=0.0
        )
    return weight
