"""Products of 129 to 256 rows, whose tiles have two sums, equal the plain functions."""

import pytest
import torch
from torch import Tensor

from triton_mode import DEVICE  # isort: skip  # before the kernels

from d2f_runtime.kernels.activation import Activation, quantise_rows
from d2f_runtime.kernels.gate import silu_gate_reference
from d2f_runtime.kernels.low_bit import dequantise_reference
from d2f_runtime.kernels.low_bit_tiling import LowBitTiling
from d2f_runtime.kernels.rope import Rotation, rotate_and_store_reference
from d2f_runtime.kernels.skinny import MAX_ROWS, Tiling, skinny_product_reference, tiling_for
from d2f_runtime.kernels.streamed import streamed_product, streamed_rotation
from d2f_runtime.kernels.streamed_low_bit import streamed_low_bit_product
from d2f_runtime.quantization.low_bit_linear import pack_low_bit
from d2f_runtime.quantization.stored import quantise
from kernel_checks import NEEDS_HOPPER, error, random
from lab.bench.step_models import SHAPES

pytestmark = pytest.mark.torch

SHARED_MEMORY = 227 * 1024  # of a program on Hopper
EPILOGUE = 5 * 1024  # what the compiler takes beside the ring


def random_bf16(*shape: int) -> Tensor:
    return random(*shape).bfloat16()


def operands(
    num_rows: int, outputs: int, features: int, *, fp8: bool
) -> tuple[Activation, Tensor, Tensor | None]:
    x, weight = random_bf16(num_rows, features), random_bf16(outputs, features)
    return (quantise_rows(x), *quantise_rows(weight)) if fp8 else (Activation(x), weight, None)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("num_rows", [129, 160, 161, 192, 193, MAX_ROWS])
@pytest.mark.parametrize("name", ["llada-8b", "dream-7b", "llama-3-8b", "70b"])
def test_tilings_fit(name: str, num_rows: int, fp8: bool) -> None:
    config = SHAPES[name]
    hidden, heads = config.hidden_size, config.num_heads + 2 * config.num_kv_heads
    for outputs, features, may_split in (
        (heads * config.head_dim, hidden, False),
        (hidden, config.num_heads * config.head_dim, True),
        (2 * config.ffn_size, hidden, False),
        (hidden, config.ffn_size, True),
        (config.vocab_size, hidden, False),
    ):
        tiling = tiling_for(num_rows, outputs, features, fp8=fp8, may_split=may_split)
        if tiling is None:  # left to the library
            continue
        assert tiling.rows + tiling.more >= num_rows
        assert outputs % tiling.outputs == 0
        assert features % (tiling.features * tiling.splits) == 0
        assert may_split or tiling.splits == 1
        assert not (tiling.persistent and tiling.splits > 1)
        rows = tiling.rows + tiling.more + tiling.outputs
        size = rows * tiling.features * (1 if fp8 else 2)
        assert size * tiling.stages + EPILOGUE <= SHARED_MEMORY


@NEEDS_HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_rows", "more"), [(128, 32), (130, 32), (160, 32), (190, 64), (256, 128)]
)
@pytest.mark.parametrize("num_tiles", [4, 150])
@pytest.mark.parametrize(("outputs", "splits"), [(64, 1), (64, 2), (128, 1)])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.usefixtures("poisoned")
def test_products(
    num_rows: int, more: int, num_tiles: int, outputs: int, splits: int, fp8: bool
) -> None:
    x, weight, scale = operands(num_rows, num_tiles * outputs, 1024, fp8=fp8)
    tiling = Tiling(
        128, outputs, 128 if fp8 else 64, 4, outputs // 16, splits,
        persistent=splits == 1, more=more,
    )  # fmt: skip
    found = streamed_product(x, weight, scale, tiling=tiling, dtype=torch.bfloat16)
    wanted = skinny_product_reference(x, weight, scale, tiling=tiling, dtype=torch.float32)
    assert error(found, wanted) < 4e-3  # bf16 results
    if splits == 1:
        gated = streamed_product(x, weight, scale, tiling=tiling, dtype=torch.bfloat16, gated=True)
        assert error(gated[0], silu_gate_reference(wanted[0]).values) < 1e-2


@NEEDS_HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize(("num_rows", "more"), [(150, 32), (180, 64)])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.usefixtures("poisoned")
def test_rotation(num_rows: int, more: int, fp8: bool) -> None:
    x, weight, scale = operands(num_rows, 1024, 1024, fp8=fp8)
    places = torch.randperm(num_rows, device=DEVICE).to(torch.int32)
    pools = [random_bf16(num_rows, 2, 128) for _ in range(2)]
    wanted_pools = [pool.float() for pool in pools]
    table = torch.randn(num_rows, 128, device=DEVICE)
    keys, values = pools
    given = Rotation(keys, values, positions=places.flip(0), places=places, table=table)
    tiling = Tiling(128, 128, 128 if fp8 else 64, 4, 8, 1, more=more)
    found = streamed_rotation(x, weight, scale, tiling=tiling, dtype=torch.bfloat16, rotation=given)
    whole = skinny_product_reference(x, weight, scale, tiling=tiling, dtype=torch.float32)[0]
    keys, values = wanted_pools
    wanted = rotate_and_store_reference(whole, given._replace(keys=keys, values=values))
    assert error(found, wanted) < 5e-3
    for pool, wanted_pool in zip(pools, wanted_pools, strict=True):
        assert error(pool, wanted_pool) < 5e-3


@NEEDS_HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize(("num_rows", "more"), [(130, 32), (160, 32), (192, 64)])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.usefixtures("poisoned")
def test_products_of_few_bits(
    quantization: str, num_rows: int, more: int, splits: int, ahead: int
) -> None:
    packed = pack_low_bit(quantise(random_bf16(256, 960), quantization))
    assert packed is not None
    x = random_bf16(num_rows, 960)
    tiling = LowBitTiling(128, 64, 4, 4, splits, ahead, more)
    found = streamed_low_bit_product(x, packed, tiling=tiling, dtype=torch.bfloat16)
    wanted = x.float() @ dequantise_reference(packed)[:, :960].T
    assert error(found.float().sum(dim=0), wanted) < 6e-3  # bf16 values, scales, parts
    if splits == 1:
        gated = streamed_low_bit_product(x, packed, tiling=tiling, dtype=torch.bfloat16, gated=True)
        assert error(gated[0], silu_gate_reference(wanted).values) < 1e-2
