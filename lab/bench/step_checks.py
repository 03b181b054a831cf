"""Checks of the fast step at the sizes that are timed: every kernel against its fp32 reference.

Fresh random inputs; outputs begin as NaN, so that what no kernel writes is seen.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from d2f_runtime.kernels.activation import Activation, quantise_rows
from d2f_runtime.kernels.attention import attend, attend_reference, rows_per_tile
from d2f_runtime.kernels.gate import silu_gate, silu_gate_reference
from d2f_runtime.kernels.head import best_tokens, best_tokens_reference
from d2f_runtime.kernels.low_bit import dequantise, dequantise_reference
from d2f_runtime.kernels.norm import residual_norm, residual_norm_reference
from d2f_runtime.kernels.rope import Rotation, rotate_and_store, rotate_and_store_reference
from d2f_runtime.kernels.skinny import skinny_product_reference, tiling_for
from d2f_runtime.kernels.streamed import streamed_product, streamed_rotation
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.quantization.low_bit_linear import LowBitLinear, pack_low_bit
from d2f_runtime.quantization.stored import LOW_BIT
from d2f_runtime.quantization.stored import quantise as quantise_weight

__all__ = ["check_kernels"]

Errors = dict[str, float | str]


def check_kernels(
    config: TransformerConfig, *, num_rows: int, cached: int, quantization: str = "bf16"
) -> Errors:
    """Return ||out - ref|| / ||ref|| of each kernel in bf16 on the current CUDA device.

    Products are checked in `quantization` where it is of 4 or 8 bits, else in bf16 and fp8.
    """
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
                positions=_integers(range(cached, stop)),
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
        keys, values = pools
        found = rotate_and_store(x, Rotation(keys, values, counting, counting, table))
        keys, values = wanted_pools
        wanted = rotate_and_store_reference(
            x.float(), Rotation(keys, values, counting, counting, table)
        )
        pairs = zip([found, *pools], [wanted, *wanted_pools], strict=True)
        return max(_error(Activation(a), Activation(b)) for a, b in pairs)

    def head() -> float:
        logits = _random(num_rows, config.vocab_size) * 4
        given: dict[str, Any] = {"mask_id": config.mask_id, "num_tokens": config.num_tokens}
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

    def rotated_product(fp8: bool) -> float:
        outputs = (heads + 2 * kv) * size
        tiling = tiling_for(num_rows, outputs, hidden, fp8=fp8, may_split=False)
        if tiling is None or kv * size % tiling.outputs:
            return 0.0
        x, weight, scale = Activation(_random(num_rows, hidden)), _random(outputs, hidden), None
        if fp8:
            x, (weight, scale) = quantise_rows(x.values), quantise_rows(weight)
        counting, table = _integers(range(num_rows)), torch.randn(num_rows, size, device="cuda")
        pools = [_random(num_rows, kv, size) for _ in range(2)]
        wanted_pools = [pool.float() for pool in pools]
        keys, values = pools
        found = streamed_rotation(
            x, weight, scale, tiling=tiling, dtype=torch.bfloat16,
            rotation=Rotation(keys, values, counting, counting, table),
        )  # fmt: skip
        whole = skinny_product_reference(x, weight, scale, tiling=tiling, dtype=torch.float32)[0]
        keys, values = wanted_pools
        wanted = rotate_and_store_reference(
            whole, Rotation(keys, values, counting, counting, table)
        )
        pairs = zip([found, *pools], [wanted, *wanted_pools], strict=True)
        return max(_error(Activation(a), Activation(b)) for a, b in pairs)

    checks |= {"rope": rope, "head": head}
    sizes = {
        "q, k and v": ((heads + 2 * kv) * size, hidden),
        "out": (hidden, heads * size),
        "gate and up": (2 * ffn, hidden),
        "down": (hidden, ffn),
    }
    if quantization in LOW_BIT:
        for name, (outputs, features) in sizes.items():
            checks[f"{name} {quantization}"] = partial(
                _check_low_bit, quantization, num_rows, outputs, features
            )
    for fp8 in (False, True) if quantization not in LOW_BIT else ():
        kind = "fp8" if fp8 else "bf16"
        checks[f"q, k and v {kind}, rotated"] = partial(rotated_product, fp8)
        checks[f"head's product {kind}"] = product(fp8, config.vocab_size, hidden)
        checks[f"out {kind}"] = product(fp8, hidden, heads * size)
        checks[f"gate and up {kind}"] = product(fp8, 2 * ffn, hidden)
        checks[f"down {kind}"] = product(fp8, hidden, ffn)
    with _poisoned():
        return {name: _guarded(check) for name, check in checks.items()}


def _check_low_bit(quantization: str, num_rows: int, outputs: int, features: int) -> float:
    """Return the largest error of a product whole, in parts, with its gate, and of many rows.

    What was quantised is compared with itself, dequantised: the products' own errors are meant.
    """
    packed = pack_low_bit(quantise_weight(_random(outputs, features), quantization))
    assert packed is not None, "bad sizes"
    linear, x = LowBitLinear(packed), Activation(_random(num_rows, features))
    weight = dequantise_reference(packed)[:, :features]
    wanted = x.values.float() @ weight.T
    pairs = [
        (linear(x).float(), wanted),
        (linear.parts(x).float().sum(dim=0), wanted),
        (dequantise(packed, torch.bfloat16)[:, :features], weight),
    ]
    gated = linear.gated(x)
    if gated is not None:
        pairs.append((gated, silu_gate_reference(wanted).values))
    return max(_error(Activation(found), Activation(ref)) for found, ref in pairs)


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
