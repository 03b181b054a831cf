"""Rotary positions for queries and keys; keys and values go straight to their places in the pool.

Biases of the merged projection and the norms of queries and keys are applied on the way.

Shapes: M rows, H query heads, KV key/value heads, hd head size, T pool places.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from d2f_runtime.kernels.language import (
    gdc_launch_dependents,
    gdc_wait,
    jit,
    overlaps,
    power_of_2,
    tl,
)

__all__ = ["HeadNorms", "rotate_and_store", "rotate_and_store_reference"]

HEADS = 16  # of one program


class HeadNorms(NamedTuple):
    """RMSNorms over the head size of queries and keys: weights [hd] each, and their epsilon."""

    query: Tensor
    key: Tensor
    eps: float


def rotate_and_store_reference(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    positions: Tensor,
    places: Tensor,
    table: Tensor,
    bias: Tensor | None = None,
    norms: HeadNorms | None = None,
) -> Tensor:
    """Return the rotated queries [M, H, hd]; store keys and values.

    Args:
        qkv: [M, (H + 2 KV) hd], queries before keys before values.
        keys: [T, KV, hd] of the pool, written at `places`.
        values: like keys.
        positions: [M] int32, canvas positions.
        places: [M] int32, pool places; a negative one stores nothing.
        table: [positions, hd] fp32, half of cosines and half of sines.
        bias: [(H + 2 KV) hd] of the projection.
        norms: of queries and keys.
    """
    num_kv, size = keys.shape[1:]
    rows = qkv.float() if bias is None else qkv.float() + bias.float()
    query, key, value = rows.view(qkv.shape[0], -1, size).tensor_split([-2 * num_kv, -num_kv], 1)
    if norms is not None:
        query = F.rms_norm(query, (size,), norms.query.float(), norms.eps)
        key = F.rms_norm(key, (size,), norms.key.float(), norms.eps)
    cos, sin = table[positions.long()][:, None].chunk(2, dim=2)  # [M, 1, hd / 2]
    stored = places >= 0
    keys[places[stored].long()] = _rotate(key, cos, sin)[stored].to(keys.dtype)
    values[places[stored].long()] = value[stored].to(values.dtype)
    return _rotate(query, cos, sin).to(qkv.dtype)


def rotate_and_store(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    positions: Tensor,
    places: Tensor,
    table: Tensor,
    bias: Tensor | None = None,
    norms: HeadNorms | None = None,
) -> Tensor:
    """Do what `rotate_and_store_reference` does; one program for a row and a few heads."""
    num_kv, size = keys.shape[1:]
    num_heads = qkv.shape[1] // size - 2 * num_kv
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
    source = qkv + row.to(tl.int64) * ((H + 2 * KV) * 2 * HALF) + at
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        first += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
        second += tl.load(bias + at + HALF, mask=inside, other=0.0).to(tl.float32)
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
