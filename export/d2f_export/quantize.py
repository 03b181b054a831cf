"""int8 weights for a step graph.

Dynamic quantization: weights per output channel, activations per matrix at run time. On CPUs it
was the fastest of what onnxruntime offers at every window size but one row (bench/onnx), because
D2F windows are bound by arithmetic and the integer kernels do more of it.

Weights keep to 7 bits. Without VNNI, x86 kernels add two u8 x s8 products in 16 bits, which 8-bit
weights overflow silently; 7 bits cannot, and cost no time where both were run.
"""

import logging
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

__all__ = ["quantize_int8"]


def quantize_int8(source: Path, target: Path) -> None:
    """Write `source` with int8 matrices. The embedding is looked up, not multiplied: it stays.

    Args:
        source: a graph by `export_graph`.
        target: another path; both cannot be one file.
    """
    if source.resolve() == target.resolve():
        raise ValueError(f"cannot quantize {source} onto itself")
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it recommends a pre-processing that changes nothing here
    try:
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
        )
    finally:
        root.setLevel(level)
