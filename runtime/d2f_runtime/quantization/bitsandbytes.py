"""Weights that transformers saved with bitsandbytes, read without bitsandbytes.

Beside a quantised `weight` lie, for NF4: `weight.absmax`, `weight.quant_map`,
`weight.quant_state.bitsandbytes__nf4` (JSON in bytes) and, where the scales are quantised as well,
`weight.nested_absmax` and `weight.nested_quant_map`; for LLM.int8: `SCB` and `weight_format`.
Format: bitsandbytes 0.50, `functional.QuantState.as_dict` and `nn.Linear8bitLt`.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from d2f_runtime.kernels.fragments import NF4_VALUES
from d2f_runtime.quantization.int8 import Int8Weight
from d2f_runtime.quantization.nf4 import Nf4Weight, dequantised_blocks
from d2f_runtime.quantization.stored import QuantizedWeight
from d2f_stream.core.errors import ModelDamaged, UnsupportedModel

__all__ = ["Beside", "find_quantized", "read_quantized"]

STATE: Final = "quant_state.bitsandbytes__"
BLOCKS: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
BY_ROWS: Final = 0  # the one `weight_format` that is still written


@dataclass(frozen=True, slots=True)
class Beside:
    """What lies beside a quantised weight.

    Attributes:
        kind: "nf4" or "int8".
        names: of its tensors, by their part of the format.
    """

    kind: str
    names: Mapping[str, str]


def find_quantized(names: Collection[str], where: object) -> dict[str, Beside]:
    """Return the quantised weights among a checkpoint's tensors.

    Args:
        names: of all tensors.
        where: for errors.

    Raises:
        UnsupportedModel: bitsandbytes wrote them in a format that is not read here.
    """
    parts: dict[str, dict[str, str]] = {}
    for name in names:
        weight, found, part = name.rpartition(".weight.")
        if found:
            parts.setdefault(weight + ".weight", {})[_part(part, name, where)] = name
        elif name.endswith((".SCB", ".weight_format")):
            layer, _, part = name.rpartition(".")
            parts.setdefault(layer + ".weight", {})[part] = name
    return {
        weight: Beside("int8" if "SCB" in beside else "nf4", beside)
        for weight, beside in parts.items()
        if weight in names
    }


def read_quantized(
    kind: str, codes: Tensor, parts: Mapping[str, Tensor], shape: tuple[int, int], where: str
) -> QuantizedWeight:
    """Put a weight together.

    Args:
        kind: "nf4" or "int8".
        codes: the tensor `weight`.
        parts: the tensors beside it, by their part of the format.
        shape: N, K, that the config asks for.
        where: for errors.

    Raises:
        ModelDamaged: a part is missing or of another size.
        UnsupportedModel: the weight is in a variant of the format that is not read here.
    """
    return (_int8 if kind == "int8" else _nf4)(codes, parts, shape, where)


def _part(part: str, name: str, where: object) -> str:
    if not part.startswith(STATE):
        return part
    kind = part.removeprefix(STATE)
    if kind != "nf4":
        raise UnsupportedModel(
            f"{where}: {name.partition('.weight.')[0]} is quantised as {kind}, but this build "
            "reads nf4 and int8; fetch another one, or the bf16 one"
        )
    return "quant_state"


def _int8(
    codes: Tensor, parts: Mapping[str, Tensor], shape: tuple[int, int], where: str
) -> QuantizedWeight:
    absmax = _needed(parts, "SCB", where)
    layout = int(parts.get("weight_format", torch.tensor(BY_ROWS)))
    if layout != BY_ROWS:
        raise UnsupportedModel(f"{where} lies in the format {layout}, not by rows; save it again")
    _same(codes.dtype == torch.int8 and tuple(codes.shape) == shape, f"{where} is not {shape} int8")
    _same(absmax.numel() == shape[0], f"{where} has {absmax.numel()} scales, not {shape[0]}")
    return Int8Weight(codes, absmax.float().flatten())


def _nf4(
    codes: Tensor, parts: Mapping[str, Tensor], shape: tuple[int, int], where: str
) -> QuantizedWeight:
    state = _state(_needed(parts, "quant_state", where), where)
    block, number = state.get("blocksize"), shape[0] * shape[1]
    if block not in BLOCKS:
        raise UnsupportedModel(f"{where} has blocks of {block}, but they must be one of {BLOCKS}")
    values = _needed(parts, "quant_map", where).float().cpu()
    if not torch.equal(values, torch.tensor(NF4_VALUES)):
        raise UnsupportedModel(f"{where} has 4-bit values that are not those of nf4")
    stored = tuple(state.get("shape") or ())
    _same(stored == shape, f"{where} has shape {stored} but the config asks for {shape}")
    flat = codes.contiguous().view(torch.uint8).flatten()  # its dtype may be that of a storage
    _same(flat.numel() * 2 == number, f"{where} has {flat.numel()} bytes for {number} codes")
    absmax = _absmax(_needed(parts, "absmax", where), parts, state, where)
    blocks = -(-number // block)
    _same(absmax.numel() == blocks, f"{where} has {absmax.numel()} scales for {blocks} blocks")
    return Nf4Weight(flat, absmax, shape, block)


def _absmax(
    absmax: Tensor, parts: Mapping[str, Tensor], state: Mapping[str, Any], where: str
) -> Tensor:
    """Return the scales [blocks] fp32, dequantised where they are quantised themselves."""
    if "nested_absmax" not in parts:
        return absmax.float()
    values = _needed(parts, "nested_quant_map", where).float()
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if not isinstance(block, int) or not isinstance(offset, float | int):
        raise ModelDamaged(f"{where} does not say how its scales are quantised")
    nested = parts["nested_absmax"].float()
    _same(
        nested.numel() == -(-absmax.numel() // block),
        f"{where} has {nested.numel()} scales of scales for {absmax.numel()} in blocks of {block}",
    )
    return dequantised_blocks(absmax, values, nested, block) + torch.tensor(
        offset, dtype=torch.float32, device=absmax.device
    )


def _state(packed: Tensor, where: str) -> Mapping[str, Any]:
    try:
        state = json.loads(bytes(packed.to(torch.uint8).tolist()))
    except ValueError as exc:
        raise ModelDamaged(f"{where} has a quant_state that is no JSON: {exc}") from exc
    if not isinstance(state, dict):
        raise ModelDamaged(f"{where} has a quant_state that is no JSON object")
    return state


def _needed(parts: Mapping[str, Tensor], part: str, where: str) -> Tensor:
    if part not in parts:
        raise ModelDamaged(f"{where} lacks its {part}; fetch or save it again")
    return parts[part]


def _same(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ModelDamaged(otherwise)
