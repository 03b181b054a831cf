"""Checks of the fast step at the sizes that are timed: every kernel against its fp32 reference.

Fresh random inputs; outputs begin as NaN, so that what no kernel writes is seen.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from d2f_runtime.kernels.activation import Activation, quantise_rows
from d2f_runtime.kernels.attention import attend, attend_reference, rows_per_tile
from d2f_runtime.kernels.gate import silu_gate, silu_gate_reference
from d2f_runtime.kernels.head import best_tokens, best_tokens_reference
from d2f_runtime.kernels.norm import residual_norm, residual_norm_reference
from d2f_runtime.kernels.rope import rotate_and_store, rotate_and_store_reference
from d2f_runtime.kernels.skinny import skinny_product_reference, tiling_for
from d2f_runtime.kernels.streamed import streamed_product
from d2f_runtime.models.config import TransformerConfig

__all__ = ["check_kernels"]

Errors = dict[str, float | str]


def check_kernels(config: TransformerConfig, *, num_rows: int, cached: int) -> Errors:
    """Return ||out - ref|| / ||ref|| of each kernel in bf16 on the current CUDA device."""
    checks: dict[str, Callable[[], float]] = {}
    hidden, heads, kv = config.hidden_size, config.num_heads, config.num_kv_heads
    size, ffn = config.head_dim, config.ffn_size
    for quantise in (False, True):
        kind = " to fp8" if quantise else ""

        def norm(quantise: bool = quantise) -> float:
            x, parts, weight = (
                _random(num_rows, hidden),
                _random(2, num_rows, hidden),
                _random(hidden),
            )
            _, found = residual_norm(x, parts, weight, 1e-5, quantise=quantise)
            _, wanted = residual_norm_reference(x.float(), parts, weight, 1e-5)
            return _error(found, wanted)

        def gate(quantise: bool = quantise) -> float:
            x = _random(num_rows, 2 * ffn)
            return _error(silu_gate(x, quantise=quantise), silu_gate_reference(x.float()))

        def attention(quantise: bool = quantise) -> float:
            stop = cached + num_rows
            query = _random(num_rows, heads, size)
            keys, values = _random(stop + 7, kv, size), _random(stop + 7, kv, size)
            per_tile = rows_per_tile(num_rows, heads // kv)
            cut = range(0, num_rows, per_tile)
            tiles = [(i, min(per_tile, num_rows - i), 7, 2**31 - 1, 0) for i in cut]
            stops = [min(stop, cached + (i // 32 + 1) * 32) for i in range(num_rows)]
            visible, cut_tiles = _integers(stops), _integers(tiles)
            found = attend(
                query, keys, values,
                visible=visible, tiles=cut_tiles, num_splits=4, quantise=quantise,
            )  # fmt: skip
            wanted = attend_reference(
                query.float(), keys.float(), values.float(), visible=visible, tiles=cut_tiles
            )
            return _error(found, wanted)

        checks |= {f"norm{kind}": norm, f"gate{kind}": gate, f"attention{kind}": attention}

    def rope() -> float:
        x = _random(num_rows, (heads + 2 * kv) * size)
        pools = [torch.zeros(num_rows, kv, size, device="cuda", dtype=x.dtype) for _ in range(2)]
        wanted_pools = [pool.float() for pool in pools]
        counting, table = _integers(range(num_rows)), torch.randn(num_rows, size, device="cuda")
        found = rotate_and_store(x, *pools, positions=counting, places=counting, table=table)
        wanted = rotate_and_store_reference(
            x.float(), *wanted_pools, positions=counting, places=counting, table=table
        )
        pairs = zip([found, *pools], [wanted, *wanted_pools], strict=True)
        return max(_error(Activation(a), Activation(b)) for a, b in pairs)

    def head() -> float:
        logits = _random(num_rows, config.vocab_size) * 4
        given = {"mask_id": config.mask_id, "num_tokens": config.num_tokens}
        found, wanted = best_tokens(logits, **given), best_tokens_reference(logits, **given)
        same = float((found[0] != wanted[0]).float().mean())  # equal bf16 logits tie
        return max(_error(Activation(found[1:]), Activation(wanted[1:])), same / 10)

    def product(fp8: bool, outputs: int, features: int) -> Callable[[], float]:
        def check() -> float:
            tiling = tiling_for(num_rows, outputs, features, fp8=fp8)
            if tiling is None:
                return 0.0
            x, weight, scale = (
                Activation(_random(num_rows, features)),
                _random(outputs, features),
                None,
            )
            if fp8:
                x, (weight, scale) = quantise_rows(x.values), quantise_rows(weight)
            found = streamed_product(x, weight, scale, tiling=tiling, dtype=torch.bfloat16)
            wanted = skinny_product_reference(
                x, weight, scale, tiling=tiling, dtype=torch.float32
            ).sum(dim=0)
            found = found.float().sum(dim=0)
            return _error(Activation(found), Activation(wanted))

        return check

    checks |= {"rope": rope, "head": head}
    for fp8 in (False, True):
        kind = "fp8" if fp8 else "bf16"
        checks[f"out {kind}"] = product(fp8, hidden, heads * size)
        checks[f"gate and up {kind}"] = product(fp8, 2 * ffn, hidden)
        checks[f"down {kind}"] = product(fp8, hidden, ffn)
    with _poisoned():
        return {name: _guarded(check) for name, check in checks.items()}


@contextmanager
def _poisoned() -> Iterator[None]:
    """Let what torch.empty returns begin as NaN."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(math.nan) if out.dtype.is_floating_point else out

    torch.empty = poisoned
    try:
        yield
    finally:
        torch.empty = empty


def _guarded(check: Callable[[], float]) -> float | str:
    """Return a check's error, or what it raised: one failure shall not hide the others."""
    try:
        return round(check(), 6)
    except Exception as failure:
        return repr(failure)[:300]


def _error(found: Activation, wanted: Activation) -> float:
    difference = found.dequantised() - wanted.dequantised()
    return float(difference.norm() / wanted.dequantised().norm())


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def _integers(values: Any) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device="cuda")
