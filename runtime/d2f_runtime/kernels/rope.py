"""Rotary positions for queries and keys; keys and values go straight to their places in the pool.

Biases of the merged projection and the norms of queries and keys are applied on the way. The
projection's outputs lie so that what turns together is computed together, as `interleave` says: a
product can then turn them before it stores anything.

Shapes: M rows, H query heads, KV key/value heads, hd head size, T pool places.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from d2f_runtime.kernels.gate import GROUP
from d2f_runtime.kernels.language import (
    gdc_launch_dependents,
    gdc_wait,
    jit,
    overlaps,
    power_of_2,
    tl,
)

__all__ = [
    "HeadNorms",
    "Rotation",
    "interleave",
    "rotate_and_store",
    "rotate_and_store_reference",
]

HEADS = 16  # of one program


class HeadNorms(NamedTuple):
    """RMSNorms over the head size of queries and keys: weights [hd] each, and their epsilon."""

    query: Tensor
    key: Tensor
    eps: float


class Rotation(NamedTuple):
    """What becomes of the outputs of a merged projection.

    Attributes:
        keys: [T, KV, hd] of the pool, written at `places`.
        values: like keys.
        positions: [M] int32, canvas positions.
        places: [M] int32, pool places; a negative one stores nothing.
        table: [positions, hd] fp32, half of cosines and half of sines.
        bias: [(H + 2 KV) hd] of the projection, laid as its outputs.
        norms: of queries and keys.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    places: Tensor
    table: Tensor
    bias: Tensor | None = None
    norms: HeadNorms | None = None

    def num_heads(self, num_outputs: int) -> int:
        """Return H, given the outputs of the projection."""
        num_kv, size = self.keys.shape[1:]
        return num_outputs // size - 2 * num_kv


def interleave(projection: Tensor, head_dim: int) -> Tensor:
    """Order the outputs [(H + 2 KV) hd, ...], GROUP of a head's first half and second in turn."""
    rest = projection.shape[1:]
    groups = projection.view(-1, 2, head_dim // 2 // GROUP, GROUP, *rest).transpose(1, 2)
    return groups.reshape(projection.shape)


def rotate_and_store_reference(qkv: Tensor, rotation: Rotation) -> Tensor:
    """Return the rotated queries [M, H, hd]; store keys and values.

    Args:
        qkv: [M, (H + 2 KV) hd], queries before keys before values, as `interleave` lays them.
        rotation: what they become.
    """
    keys, values, positions, places, table, bias, norms = rotation
    num_kv, size = keys.shape[1:]
    rows = qkv.float() if bias is None else qkv.float() + bias.float()
    groups = rows.view(qkv.shape[0], -1, size // 2 // GROUP, 2, GROUP).transpose(2, 3)
    heads = groups.reshape(qkv.shape[0], -1, size)
    query, key, value = heads.tensor_split([-2 * num_kv, -num_kv], 1)
    if norms is not None:
        query = F.rms_norm(query, (size,), norms.query.float(), norms.eps)
        key = F.rms_norm(key, (size,), norms.key.float(), norms.eps)
    cos, sin = table[positions.long()][:, None].chunk(2, dim=2)  # [M, 1, hd / 2]
    stored = places >= 0
    keys[places[stored].long()] = _rotate(key, cos, sin)[stored].to(keys.dtype)
    values[places[stored].long()] = value[stored].to(values.dtype)
    return _rotate(query, cos, sin).to(qkv.dtype)


def rotate_and_store(qkv: Tensor, rotation: Rotation) -> Tensor:
    """Do what `rotate_and_store_reference` does; one program for a row and a few heads."""
    keys, values, positions, places, table, bias, norms = rotation
    num_kv, size = keys.shape[1:]
    num_heads = rotation.num_heads(qkv.shape[1])
    num_rows = qkv.shape[0]
    query = torch.empty((num_rows, num_heads, size), device=qkv.device, dtype=qkv.dtype)
    pdl = overlaps(qkv.device)
    heads_at_once = min(HEADS, power_of_2(num_heads))
    num_groups = -(-(num_heads + 2 * num_kv) // heads_at_once)
    _rotate_and_store[(num_rows, num_groups)](
        qkv, bias, query, keys, values, positions, places, table,
        None if norms is None else norms.query,
        None if norms is None else norms.key,
        0.0 if norms is None else norms.eps,
        H=num_heads, KV=num_kv, HALF=size // 2, HEADS=heads_at_once, PDL=pdl,
        num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return query


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=2)


@jit
def _rotate_and_store(
    qkv, bias, query, keys, values, positions, places, table, query_norm, key_norm, eps,
    H: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    place = tl.load(places + row).to(tl.int64)
    angle = table + tl.load(positions + row).to(tl.int64) * (2 * HALF) + tl.arange(0, HALF)
    cos_row, sin_row = tl.load(angle), tl.load(angle + HALF)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)  # [HEADS]
    dim = tl.arange(0, HALF)
    at = head[:, None] * (2 * HALF) + dim[None, :]  # [HEADS, HALF], the first half of each head
    inside = (head < H + 2 * KV)[:, None]
    turns = head[:, None] * (2 * HALF) + (dim // 8 * 16 + dim % 8)[None, :]
    source = qkv + row.to(tl.int64) * ((H + 2 * KV) * 2 * HALF) + turns
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + 8, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        first += tl.load(bias + turns, mask=inside, other=0.0).to(tl.float32)
        second += tl.load(bias + turns + 8, mask=inside, other=0.0).to(tl.float32)
    is_value = (head >= H + KV)[:, None]
    if query_norm is not None:
        is_query = (head < H)[:, None]
        square = tl.sum(first * first + second * second, axis=1)[:, None]
        factor = tl.rsqrt(square / (2 * HALF) + eps)
        factor = tl.where(is_value, 1.0, factor)
        gain = tl.where(is_query, tl.load(query_norm + dim)[None, :].to(tl.float32),
                        tl.load(key_norm + dim)[None, :].to(tl.float32))  # fmt: skip
        first = first * factor * tl.where(is_value, 1.0, gain)
        gain = tl.where(is_query, tl.load(query_norm + HALF + dim)[None, :].to(tl.float32),
                        tl.load(key_norm + HALF + dim)[None, :].to(tl.float32))  # fmt: skip
        second = second * factor * tl.where(is_value, 1.0, gain)
    cos = tl.where(is_value, 1.0, cos_row[None, :])
    sin = tl.where(is_value, 0.0, sin_row[None, :])
    turned_first = first * cos - second * sin
    turned_second = second * cos + first * sin
    to_query = query + row.to(tl.int64) * (H * 2 * HALF) + at
    inside = (head < H)[:, None]
    tl.store(to_query, turned_first.to(query.dtype.element_ty), mask=inside)
    tl.store(to_query + HALF, turned_second.to(query.dtype.element_ty), mask=inside)
    shift = place * (KV * 2 * HALF) + at - H * 2 * HALF
    inside = ((head >= H) & (head < H + KV) & (place >= 0))[:, None]
    tl.store(keys + shift, turned_first.to(keys.dtype.element_ty), mask=inside)
    tl.store(keys + shift + HALF, turned_second.to(keys.dtype.element_ty), mask=inside)
    shift -= KV * 2 * HALF
    inside = ((head >= H + KV) & (head < H + 2 * KV) & (place >= 0))[:, None]
    tl.store(values + shift, turned_first.to(values.dtype.element_ty), mask=inside)
    tl.store(values + shift + HALF, turned_second.to(values.dtype.element_ty), mask=inside)
