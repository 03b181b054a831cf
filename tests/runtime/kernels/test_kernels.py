"""Every kernel equals the plain function beside it, on fresh random inputs and poisoned outputs."""

import pytest
import torch
from torch import Tensor

from triton_mode import CAN_RUN, DEVICE  # isort: skip  # before the kernels

from d2f_runtime.kernels.activation import Activation, quantise, quantise_rows
from d2f_runtime.kernels.attention import attend, attend_reference, rows_per_tile
from d2f_runtime.kernels.fetch import fetch
from d2f_runtime.kernels.gate import silu_gate, silu_gate_reference
from d2f_runtime.kernels.head import best_tokens, best_tokens_reference
from d2f_runtime.kernels.language import HAS_TRITON
from d2f_runtime.kernels.norm import residual_norm, residual_norm_reference
from d2f_runtime.kernels.rope import (
    HeadNorms,
    Rotation,
    interleave,
    rotate_and_store,
    rotate_and_store_reference,
)
from d2f_runtime.kernels.skinny import Tiling, skinny_product, skinny_product_reference
from d2f_runtime.kernels.streamed import streamed_product, streamed_rotation
from kernel_checks import NEEDS_HOPPER, error, random

pytestmark = [
    pytest.mark.torch,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(
        not HAS_TRITON or not CAN_RUN, reason="needs triton, on a GPU or interpreted"
    ),
]


# fp32 sums in another order
CLOSE = 1e-5
# A rounding that falls the other way moves a value by a step of e4m3, an eighth of it. The
# interpreter truncates where the device and torch round to the nearest, so there all values move.
CLOSE_FP8 = 1e-2 if DEVICE == "cuda" else 1e-1


NOT_NUMBERS = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, interpreted
NEEDS_FP8_NAN = pytest.mark.skipif(DEVICE != "cuda", reason="NaN in fp8 is a number, interpreted")


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_close(found: Activation, wanted: Activation) -> None:
    assert (found.scale is None) == (wanted.scale is None)
    bound = CLOSE if found.scale is None else CLOSE_FP8
    assert error(found.dequantised(), wanted.dequantised()) < bound


@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize("num_parts", [0, 1, 3])
def test_residual_norm(num_parts: int, quantise: bool) -> None:
    x, weight = random(5, 72), random(72)
    parts = random(num_parts, 5, 72) if num_parts else None
    total, rows = residual_norm(x, parts, weight, 1e-5, quantise=quantise)
    wanted_total, wanted = residual_norm_reference(x, parts, weight, 1e-5, quantise=quantise)
    assert error(total, wanted_total) < CLOSE
    assert_close(rows, wanted)


@pytest.mark.parametrize("quantise", [False, True])
def test_silu_gate(quantise: bool) -> None:
    gate_up = random(3, 2 * 4504)
    found = silu_gate(gate_up, quantise=quantise)
    assert_close(found, silu_gate_reference(gate_up, quantise=quantise))


def test_quantisation() -> None:
    x = random(3, 300)
    assert_close(quantise(x), quantise_rows(x))


def rotation(pools: list[Tensor], num_outputs: int, *, bias: bool, norms: bool) -> Rotation:
    """Of 5 rows, of which one is stored nowhere."""
    keys, values = pools
    size = keys.shape[2]
    return Rotation(
        keys,
        values,
        positions=integers(3, 4, 39, 0, 7),
        places=integers(8, 2, -1, 0, 11),
        table=random(40, size),
        bias=random(num_outputs) if bias else None,
        norms=HeadNorms(random(size), random(size), 1e-6) if norms else None,
    )


@pytest.mark.parametrize(("heads", "num_kv"), [(4, 4), (6, 2), (7, 1)])
@pytest.mark.parametrize("extras", [False, True])
def test_rotation_and_store(heads: int, num_kv: int, extras: bool) -> None:
    qkv = random(5, (heads + 2 * num_kv) * 16)
    pools = [random(12, num_kv, 16) for _ in range(2)]
    wanted_pools = [pool.clone() for pool in pools]
    given = rotation(pools, qkv.shape[1], bias=extras, norms=extras)
    found = rotate_and_store(qkv, given)
    keys, values = wanted_pools
    wanted = rotate_and_store_reference(qkv, given._replace(keys=keys, values=values))
    assert error(found, wanted) < CLOSE
    for pool, wanted_pool in zip(pools, wanted_pools, strict=True):
        assert error(pool, wanted_pool) < CLOSE


def test_the_halves_of_a_head_take_turns() -> None:
    outputs = torch.arange(3 * 32)
    laid = interleave(outputs, 32).view(3, 2, 2, 8)
    assert torch.equal(laid[1, 0, 0], torch.arange(32, 40))
    assert torch.equal(laid[1, 0, 1], torch.arange(48, 56))
    assert torch.equal(laid[1, 1, 0], torch.arange(40, 48))
    assert torch.equal(interleave(outputs[:, None], 32)[:, 0], laid.flatten())


def tiles_of(sessions: list[tuple[int, int, int, int, int]], per_tile: int) -> Tensor:
    """Cut sessions (first row, rows, offset, border, elsewhere) into tiles, and one unused."""
    cut = [
        (first + at, min(per_tile, count - at), offset, border, elsewhere)
        for first, count, offset, border, elsewhere in sessions
        for at in range(0, count, per_tile)
    ]
    return torch.tensor([*cut, (0, 0, 0, 0, 0)], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(("heads", "num_kv"), [(2, 2), (6, 2), (7, 1)])
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("quantise", [False, True])
def test_attention_of_ragged_sessions(
    heads: int, num_kv: int, num_splits: int, quantise: bool
) -> None:
    # 20 rows over 100 places, 3 rows from position 0, and a branch whose own K/V lie at 280..284
    sessions = [(0, 20, 10, 999, 0), (20, 3, 150, 999, 0), (23, 4, 10, 100, 180)]
    visible = integers(*[110] * 12, *[120] * 8, 3, 3, 3, 102, 102, 104, 104, 0, 0)
    query = random(29, heads, 16)
    keys, values = random(300, num_kv, 16), random(300, num_kv, 16)
    keys[200:280] = values[200:280] = float("nan")  # nobody's
    tiles = tiles_of(sessions, rows_per_tile(29, heads // num_kv))
    given = {"visible": visible, "tiles": tiles, "quantise": quantise}
    found = attend(query, keys, values, num_splits=num_splits, **given)  # type: ignore[arg-type]
    wanted = attend_reference(query, keys, values, **given)  # type: ignore[arg-type]
    assert_close(found, wanted)
    assert not found.dequantised()[27:].any()


def test_best_tokens() -> None:
    size = 20_000 if DEVICE == "cuda" else 5_000  # the interpreter is slow
    logits = random(5, size) * 3
    logits[0, 3] = logits[1, size - 10] = 50.0  # forbidden
    logits[2, 17] = 40.0  # all mass on one id
    logits[3] = 1.5  # the lowest id wins
    found = best_tokens(logits, mask_id=3, num_tokens=size - 10)
    wanted = best_tokens_reference(logits, mask_id=3, num_tokens=size - 10)
    wanted[0, 3] = 0.0
    assert found[0].tolist() == wanted[0].tolist()
    assert torch.allclose(found[1:], wanted[1:], rtol=1e-4, atol=1e-6)


@NOT_NUMBERS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 1500, 2485])  # the shares of three programs
def test_confidence_of_logits_that_are_no_numbers_is_none(value: float, at: int) -> None:
    logits = random(5, 2500) * 3
    logits[1, at] = value
    logits[2, 3] = logits[3, 2495] = value  # forbidden: they do not matter
    found = best_tokens(logits, mask_id=3, num_tokens=2490)
    wanted = best_tokens_reference(logits, mask_id=3, num_tokens=2490)
    for answers in (found, wanted):
        assert answers[1].isnan().tolist() == [False, True, False, False, False]
    assert 0 <= found[0, 1] < 2500


@NOT_NUMBERS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("quantise", [False, pytest.param(True, marks=NEEDS_FP8_NAN)])
def test_what_is_no_number_is_carried_on(value: float, quantise: bool) -> None:
    """By every stage of a layer, so that it shows in the logits."""
    rows = random(5, 256)
    rows[3, 17] = value
    gain = torch.ones(256, device=DEVICE, dtype=rows.dtype)
    _, normed = residual_norm(rows, None, gain, 1e-6, quantise=quantise)
    for found in (normed, silu_gate(rows, quantise=quantise)):
        finite = found.dequantised().isfinite().all(dim=1)
        assert finite.tolist() == [True, True, True, False, True]


@NOT_NUMBERS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_attention_carries_on_what_is_no_number(value: float, num_splits: int) -> None:
    tiles = tiles_of([(0, 20, 10, 999, 0)], rows_per_tile(20, 1))
    visible = integers(*[60] * 12, *[120] * 8)  # canvas position 70, place 80, is seen by the last
    for broken in range(3):
        states = [random(20, 2, 16), random(300, 2, 16), random(300, 2, 16)]
        states[broken][15 if broken == 0 else 80] = value
        query, keys, values = states
        found = attend(query, keys, values, visible=visible, tiles=tiles, num_splits=num_splits)
        finite = found.dequantised().isfinite().all(dim=1).tolist()
        assert not finite[15]
        if broken == 0:
            assert finite.count(False) == 1


def test_what_crosses_to_the_host_and_back_lies_in_its_memory() -> None:
    pinned = DEVICE == "cuda"
    sent = torch.arange(1500, dtype=torch.int32, pin_memory=pinned)
    fetched = torch.zeros(1500, dtype=torch.int32, device=DEVICE)
    fetch(sent, fetched)
    assert torch.equal(fetched.cpu(), sent)
    logits = random(7, 3000)
    out = torch.full((4, 7), float("nan"), pin_memory=pinned)
    best_tokens(logits, mask_id=3, num_tokens=2990, out=out)
    if pinned:
        torch.cuda.synchronize()
    assert torch.equal(out, best_tokens(logits, mask_id=3, num_tokens=2990).cpu())


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("num_rows", [3, 40])
@pytest.mark.parametrize("fp8", [False, True])
def test_skinny_product(num_rows: int, splits: int, fp8: bool) -> None:
    x, weight = Activation(random(num_rows, 256)), random(128, 256)
    scale = None
    if fp8:
        x = quantise_rows(x.values)
        weight, scale = quantise_rows(weight)
    tiling = Tiling(32, 64, 64, 2, 4, splits)
    found = skinny_product(x, weight, scale, tiling=tiling, dtype=torch.float32)
    wanted = skinny_product_reference(x, weight, scale, tiling=tiling, dtype=torch.float32)
    assert found.shape == wanted.shape
    # Hopper's matrix units add fp8 products with fewer bits than fp32
    assert error(found, wanted) < (2e-3 if fp8 and DEVICE == "cuda" else CLOSE)


def operands(
    num_rows: int, outputs: int, features: int, *, fp8: bool
) -> tuple[Activation, Tensor, Tensor | None]:
    x = Activation(random(num_rows, features).bfloat16())
    weight = random(outputs, features).bfloat16()
    if not fp8:
        return x, weight, None
    return quantise_rows(x.values), *quantise_rows(weight)


@NEEDS_HOPPER
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("num_rows", [3, 40, 128])
@pytest.mark.parametrize("fp8", [False, True])
def test_streamed_product(num_rows: int, splits: int, fp8: bool) -> None:
    x, weight, scale = operands(num_rows, 256, 1024, fp8=fp8)
    rows = 16 if num_rows < 16 else 64 if num_rows <= 64 else 128
    tiling = Tiling(rows, 64, 128 if fp8 else 64, 5, 4, splits)
    found = streamed_product(x, weight, scale, tiling=tiling, dtype=torch.bfloat16)
    wanted = skinny_product_reference(x, weight, scale, tiling=tiling, dtype=torch.float32)
    assert error(found, wanted) < 4e-3  # bf16 results
    if splits == 1:
        gated = streamed_product(x, weight, scale, tiling=tiling, dtype=torch.bfloat16, gated=True)
        assert error(gated[0], silu_gate_reference(wanted[0]).values) < 1e-2


@NEEDS_HOPPER
@pytest.mark.parametrize("num_tiles", [1, 132, 133, 300])
@pytest.mark.parametrize("stages", [2, 4, 9])
@pytest.mark.parametrize("fp8", [False, True])
def test_programs_go_on_to_further_tiles(num_tiles: int, stages: int, fp8: bool) -> None:
    x, weight, scale = operands(30, num_tiles * 64, 1024, fp8=fp8)
    tiling = Tiling(32, 64, 256 if fp8 else 128, stages, 4, 1, persistent=True)
    for gated in (False, True):
        found = streamed_product(
            x, weight, scale, tiling=tiling, dtype=torch.bfloat16, gated=gated
        )[0]
        wanted = skinny_product_reference(x, weight, scale, tiling=tiling, dtype=torch.float32)[0]
        if gated:
            wanted = silu_gate_reference(wanted).values
        assert error(found, wanted) < 1e-2


@NEEDS_HOPPER
@pytest.mark.parametrize(("heads", "num_kv", "size"), [(4, 4, 64), (3, 1, 128), (4, 2, 32)])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_streamed_rotation(heads: int, num_kv: int, size: int, extras: bool, fp8: bool) -> None:
    outputs = (heads + 2 * num_kv) * size
    x, weight, scale = operands(5, outputs, 1024, fp8=fp8)
    pools = [random(12, num_kv, size).bfloat16() for _ in range(2)]
    wanted_pools = [pool.float() for pool in pools]
    given = rotation(pools, outputs, bias=extras, norms=False)
    tiling = Tiling(16, 64, 128 if fp8 else 64, 5, 4, 1)
    found = streamed_rotation(x, weight, scale, tiling=tiling, dtype=torch.bfloat16, rotation=given)
    whole = skinny_product_reference(x, weight, scale, tiling=tiling, dtype=torch.float32)[0]
    keys, values = wanted_pools
    wanted = rotate_and_store_reference(whole, given._replace(keys=keys, values=values))
    assert error(found, wanted) < 5e-3
    for pool, wanted_pool in zip(pools, wanted_pools, strict=True):
        assert error(pool, wanted_pool) < 5e-3
