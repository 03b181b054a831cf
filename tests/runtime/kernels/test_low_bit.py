"""Weights of 4 and 8 bits: their order in memory, and each kernel against the plain function."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from triton_mode import CAN_RUN, DEVICE  # isort: skip  # before the kernels

from d2f_runtime.kernels.activation import Activation
from d2f_runtime.kernels.fragments import (
    NF4_VALUES,
    nf4_bytes,
    pack_codes,
    pack_scales,
    unpack_codes,
    unpack_scales,
)
from d2f_runtime.kernels.gate import silu_gate_reference
from d2f_runtime.kernels.language import HAS_TRITON
from d2f_runtime.kernels.low_bit import dequantise, dequantise_reference
from d2f_runtime.kernels.low_bit_tiling import (
    MAX_ROWS,
    STRIDES,
    LowBitTiling,
    low_bit_tiling,
)
from d2f_runtime.kernels.streamed_low_bit import streamed_low_bit_product
from d2f_runtime.quantization.low_bit_linear import LowBitLinear, pack_low_bit
from d2f_runtime.quantization.stored import quantise
from kernel_checks import NEEDS_HOPPER, error, random

pytestmark = pytest.mark.torch

NEEDS_TRITON = pytest.mark.skipif(
    not (HAS_TRITON and CAN_RUN), reason="needs triton, and a GPU or TRITON_INTERPRET=1"
)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_come_back_from_their_order(bits: int) -> None:
    shape = (128, 512)
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8)
    words = pack_codes(codes, bits=bits)
    assert words.numel() * 32 == codes.numel() * bits
    assert torch.equal(unpack_codes(words, shape, bits=bits), codes)


def test_scales_come_back_from_their_order() -> None:
    scales = torch.rand(128, 12).bfloat16()
    assert torch.equal(unpack_scales(pack_scales(scales)), scales.float())


def test_a_thread_owns_what_its_matrix_instruction_reads() -> None:
    """Thread t of a warp: outputs t / 4 and 8 on, features 2 (t % 4), the next, and 8 on each."""
    outputs, features = torch.arange(64)[:, None], torch.arange(64)[None, :]
    thread = outputs // 16 * 32 + outputs % 8 * 4 + features % 8 // 2
    for bits in (4, 8):
        words = pack_codes(thread.to(torch.uint8) & ((1 << bits) - 1), bits=bits)
        owners = unpack_codes(words, (64, 64), bits=bits)
        assert torch.equal(owners, thread.to(torch.uint8) & ((1 << bits) - 1))
        bytes_of = words.view(torch.uint8).view(-1, 128, 16)  # 16 bytes of a load to each thread
        for owner in range(128):
            found = bytes_of[:, owner]
            held = torch.cat([found & 15, found >> 4]) if bits == 4 else found
            assert set(held.flatten().tolist()) == {owner % (1 << bits)}


def test_the_tables_of_bytes_are_the_values_in_bf16() -> None:
    high, low = nf4_bytes()[:4], nf4_bytes()[4:]
    bytes_of = [
        b"".join(number.to_bytes(4, "little") for number in numbers) for numbers in (high, low)
    ]
    pairs = bytearray(b for pair in zip(bytes_of[1], bytes_of[0], strict=True) for b in pair)
    found = torch.frombuffer(pairs, dtype=torch.bfloat16)
    assert torch.equal(found, torch.tensor(NF4_VALUES).bfloat16())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("shape", [(64, 256), (192, 320)])
def test_packed_weights_are_the_quantised_ones(quantization: str, shape: tuple[int, int]) -> None:
    stored = quantise(random(*shape), quantization)
    packed = pack_low_bit(stored)
    assert packed is not None
    assert packed.shape[1] % STRIDES[packed.bits] == 0
    found = dequantise_reference(packed)
    assert not found[:, shape[1] :].any()  # filled up with nothing
    # scales of blocks are rounded to bf16
    bound = 2**-8 if quantization == "nf4" else 1e-6
    wanted = stored.dequantised(torch.float32)
    assert ((found[:, : shape[1]] - wanted).abs() <= wanted.abs() * bound).all()


@pytest.mark.parametrize("shape", [(96, 256), (64, 96)])
def test_sizes_that_no_tile_divides_are_not_packed(shape: tuple[int, int]) -> None:
    assert pack_low_bit(quantise(random(*shape), "nf4")) is None


@given(
    num_rows=st.integers(1, 300),
    outputs=st.integers(1, 2000),
    steps=st.integers(1, 120),
    bits=st.sampled_from([4, 8]),
)
def test_every_split_has_work(num_rows: int, outputs: int, steps: int, bits: int) -> None:
    features = steps * STRIDES[bits]
    tiling = low_bit_tiling(num_rows, outputs * 64, features, bits=bits)
    if num_rows > MAX_ROWS:
        assert tiling is None
        return
    assert tiling is not None
    assert tiling.rows + tiling.more >= num_rows
    assert (tiling.splits - 1) * -(-steps // tiling.splits) < steps
    whole = low_bit_tiling(num_rows, outputs * 64, features, bits=bits, may_split=False)
    assert whole is not None
    assert whole.splits == 1


@NEEDS_TRITON
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.usefixtures("poisoned")
def test_dequantisation(quantization: str) -> None:
    packed = pack_low_bit(quantise(random(128, 512), quantization))
    assert packed is not None
    found = dequantise(packed, torch.float32)
    assert torch.equal(found, dequantise_reference(packed))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_products_of_any_number_of_rows(quantization: str) -> None:
    packed = pack_low_bit(quantise(random(128, 320), quantization))
    assert packed is not None
    linear = LowBitLinear(packed)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    for num_rows in (1, 40, 300):
        x = Activation(random(num_rows, 320).to(dtype))
        wanted = x.values.float() @ dequantise_reference(packed)[:, :320].T
        bound = 6e-3 if DEVICE == "cuda" else 1e-5  # roundings to bf16
        assert error(linear(x), wanted) < bound
        assert error(linear.parts(x).float().sum(dim=0), wanted) < bound


@NEEDS_HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("num_rows", [1, 20, 64, 128, 200])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("outputs", "warps", "ahead"), [(64, 4, 1), (64, 4, 2), (128, 8, 2)])
@pytest.mark.usefixtures("poisoned")
def test_streamed_products(
    quantization: str, num_rows: int, splits: int, outputs: int, warps: int, ahead: int
) -> None:
    packed = pack_low_bit(quantise(random(256, 1000 - 40), quantization))
    assert packed is not None
    x = random(num_rows, 960).bfloat16()
    rows = next(size for size in (16, 32, 64, 128, 256) if size >= num_rows)
    tiling = LowBitTiling(rows, outputs, 5, warps, splits, ahead)
    found = streamed_low_bit_product(x, packed, tiling=tiling, dtype=torch.bfloat16)
    wanted = x.float() @ dequantise_reference(packed)[:, :960].T
    assert error(found.float().sum(dim=0), wanted) < 6e-3  # bf16 values, scales, parts
    if splits == 1:
        gated = streamed_low_bit_product(x, packed, tiling=tiling, dtype=torch.bfloat16, gated=True)
        assert error(gated[0], silu_gate_reference(wanted).values) < 1e-2
