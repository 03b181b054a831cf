"""NF4 and int8 are those of bitsandbytes: bit for bit, against bitsandbytes itself."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import triton_mode  # noqa: F401  # isort: skip  # before the kernels

from d2f_runtime.kernels.gate import interleave
from d2f_runtime.quantization.bitsandbytes import find_quantized, read_quantized
from d2f_runtime.quantization.int8 import Int8Weight, quantise_int8
from d2f_runtime.quantization.nf4 import Nf4Weight, quantise_nf4
from d2f_runtime.quantization.stored import join_outputs, quantise
from d2f_stream.core.errors import ModelDamaged, UnsupportedModel

pytestmark = pytest.mark.torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(outputs: int = 24, features: int = 128, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(outputs + features)
    drawn = torch.randn(outputs, features, generator=generator) * 0.05
    drawn[1] = 0  # a row of nothing
    return drawn.to(dtype)


def saved(
    weight: Tensor, *, nested: bool = False, kind: str = "nf4", block: int = 64
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Return bitsandbytes' codes, the tensors beside them and what it dequantises them to."""
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(
        weight, blocksize=block, compress_statistics=nested, quant_type=kind
    )
    dense = functional.dequantize_4bit(codes, state)
    return codes, state.as_dict(packed=True), dense


def parts_of(beside: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"quant_state" if "bitsandbytes" in name else name: t for name, t in beside.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24, 128), (6, 64), (130, 1024)])
def test_nf4_equals_bitsandbytes(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = weights(*shape, dtype)
    codes, beside, dense = saved(weight)
    ours = quantise_nf4(weight)
    assert torch.equal(ours.codes, codes.flatten())
    assert torch.equal(ours.absmax, beside["absmax"])
    assert torch.equal(ours.dequantised(dtype), dense)


@pytest.mark.parametrize("shape", [(6, 96), (13, 10)])
def test_blocks_may_cross_rows(shape: tuple[int, int]) -> None:
    # bitsandbytes' own kernels for CPUs do not undo what it did to such a weight
    weight = weights(*shape)
    codes, beside, _ = saved(weight)
    ours = quantise_nf4(weight)
    assert torch.equal(ours.codes, codes.flatten())
    assert torch.equal(ours.absmax, beside["absmax"])
    # no value is further from its weight than half of the widest gap between two codes
    error = (ours.dequantised(torch.float32) - weight).abs().flatten()
    assert all(
        e.max() <= 0.16 * m for e, m in zip(torch.split(error, 64), ours.absmax, strict=True)
    )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [64, 128])
def test_saved_nf4_is_read_bit_for_bit(nested: bool, block: int) -> None:
    weight = weights(48, 512, torch.bfloat16)
    codes, beside, dense = saved(weight, nested=nested, block=block)
    found = read_quantized("nf4", codes, parts_of(beside), (48, 512), "w")
    assert torch.equal(found.dequantised(torch.bfloat16), dense)


def test_int8_equals_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = weights(dtype=torch.float16)
    weight[1, 3] = 1e-3  # bitsandbytes makes no number of a row of nothing
    values, absmax, _ = functional.int8_vectorwise_quant(weight)
    ours = quantise_int8(weight)
    assert torch.equal(ours.values, values)
    assert torch.equal(ours.absmax, absmax)
    wanted = functional.int8_vectorwise_dequant(values, absmax)
    assert torch.equal(ours.dequantised(torch.float32), wanted)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_rows_of_nothing_stay_nothing(quantization: str) -> None:
    dense = quantise(weights(), quantization).dequantised(torch.float32)
    assert not dense[1].any()
    assert torch.isfinite(dense).all()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("join", [interleave, lambda *given: torch.cat(given)])
def test_joined_weights_are_the_join_of_their_values(
    quantization: str, join: Callable[..., Tensor]
) -> None:
    first, second = weights(16, 128), weights(16, 128) * 3
    joined = join_outputs(
        [quantise(weight, quantization) for weight in (first, second)], join, torch.float32
    )
    assert isinstance(joined, Nf4Weight | Int8Weight)
    wanted = join(*[quantise(w, quantization).dequantised(torch.float32) for w in (first, second)])
    assert torch.equal(joined.dequantised(torch.float32), wanted)


def test_weights_whose_blocks_cross_rows_are_joined_dense() -> None:
    parts = [quantise_nf4(weights(8, 96)) for _ in range(2)]
    joined = join_outputs(parts, interleave, torch.float32)
    assert isinstance(joined, Tensor)
    wanted = [part.dequantised(torch.float32) for part in parts]
    assert torch.equal(joined, interleave(*wanted))


def test_large_weights_are_quantised_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = quantise_nf4(weights(40, 256))
    monkeypatch.setattr("d2f_runtime.quantization.nf4.PIECE", 4096)
    found = quantise_nf4(weights(40, 256))
    assert torch.equal(found.codes, wanted.codes)
    assert torch.equal(found.absmax, wanted.absmax)


def nf4_parts(**changes: object) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what lies beside an NF4 weight [4, 64], without bitsandbytes."""
    ours = quantise_nf4(weights(4, 64))
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 64]} | changes
    from d2f_runtime.kernels.fragments import NF4_VALUES

    packed = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    parts = {"absmax": ours.absmax, "quant_map": torch.tensor(NF4_VALUES), "quant_state": packed}
    return ours.codes[:, None], parts


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"blocksize": 48}, UnsupportedModel, "blocks of 48, but they must be one of"),
        ({"blocksize": 128}, ModelDamaged, "4 scales for 2 blocks"),
        ({"shape": [4, 32]}, ModelDamaged, r"shape \(4, 32\) but the config asks for \(4, 64\)"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, object], error: type[Exception], says: str
) -> None:
    codes, parts = nf4_parts(**changes)
    if "shape" in changes:
        parts["quant_state"] = nf4_parts(shape=[4, 32])[1]["quant_state"]
    with pytest.raises(error, match=says):
        read_quantized("nf4", codes, parts, (4, 64), "w")


@pytest.mark.parametrize("part", ["absmax", "quant_map", "quant_state"])
def test_a_missing_part_is_named(part: str) -> None:
    codes, parts = nf4_parts()
    del parts[part]
    with pytest.raises(ModelDamaged, match=f"w lacks its {part}"):
        read_quantized("nf4", codes, parts, (4, 64), "w")


def test_other_values_and_broken_states_are_refused() -> None:
    codes, parts = nf4_parts()
    with pytest.raises(UnsupportedModel, match="not those of nf4"):
        read_quantized("nf4", codes, parts | {"quant_map": torch.zeros(16)}, (4, 64), "w")
    broken = torch.tensor(list(b"{"), dtype=torch.uint8)
    with pytest.raises(ModelDamaged, match="no JSON"):
        read_quantized("nf4", codes, parts | {"quant_state": broken}, (4, 64), "w")


def test_int8_in_another_layout_is_refused() -> None:
    ours = quantise_int8(weights())
    parts = {"SCB": ours.absmax, "weight_format": torch.tensor(2, dtype=torch.uint8)}
    with pytest.raises(UnsupportedModel, match="format 2, not by rows"):
        read_quantized("int8", ours.values, parts, ours.shape, "w")


def test_what_is_quantised_shows_in_the_names() -> None:
    nf4 = ["a.weight", "a.weight.absmax", "a.weight.quant_state.bitsandbytes__nf4"]
    found = find_quantized([*nf4, "b.weight", "b.SCB", "c.weight", "c.bias"], "file")
    assert {name: beside.kind for name, beside in found.items()} == {
        "a.weight": "nf4",
        "b.weight": "int8",
    }
    with pytest.raises(UnsupportedModel, match="file: a is quantised as fp4, but this build reads"):
        find_quantized(["a.weight", "a.weight.quant_state.bitsandbytes__fp4"], "file")
