"""How a matrix is stored in a step graph and multiplied there.

`fp32` and `fp16`: as it is. `int8`: dynamic quantization, weights per output channel, activations
per row at run time, so that what becomes of a row does not depend on the rows beside it. (One scale
for all rows, for which onnxruntime has a fused operator, was no faster, and four times as rough
where rows differ in size.) On CPUs it was the fastest of what onnxruntime offers at every window
size but one row (bench/onnx), because D2F windows are bound by arithmetic and the integer kernels
do more of it. `int4`: blocks of 32 weights with one scale each, which onnxruntime's MatMulNBits
reads; symmetric, the form for which its CUDA kernels are built. With fp16 activations a matrix
whose inputs are no multiple of 64 stays in fp16: CUDA's fused kernels would take it and fail.
`int4-int8`: 4 bits in the file and 8 in memory, see `packed`; activations as with `int8`. Its table
of embeddings, which may be the head too, has 6 bits.

`int8` weights keep to 7 bits. Without VNNI, x86 kernels add two u8 x s8 products in 16 bits, which
8-bit weights overflow silently; 7 bits cannot, and cost no time where both were run. Those of
`int4-int8` are unsigned, which kernels add up in 32 bits.

Shapes: N outputs, K inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from d2f_export.onnx.graph_builder import MICROSOFT, Array, GraphBuilder, Stored, Value, Weights
from d2f_export.onnx.matrix_rows import by_rows
from d2f_export.onnx.packed import BYTE_ZERO, Packing

__all__ = ["FLOATS", "QUANTIZATIONS", "Linear", "Quantization", "pack_int4", "pack_int8"]

Quantization = Literal["fp32", "fp16", "int8", "int4", "int4-fp16", "int4-int8"]
QUANTIZATIONS: Final[tuple[Quantization, ...]] = get_args(Quantization)
FLOATS: Final = {"fp16": "float16", "int4-fp16": "float16"}  # of activations; else float32

INT8_MAX: Final = 64  # of weights
TORCH: Final = {"float32": torch.float32, "float16": torch.float16}
ROW_MAX: Final = 127.0  # of activations, around 128
SMALLEST: Final = 1e-9  # of a row's largest magnitude; a row of zeros has a scale all the same
INT4_BLOCK: Final = 32
FUSED_INPUTS: Final = 64  # that CUDA's int4 kernels read at once
LAYERS: Final = Packing(4)  # of int4-int8
TABLE: Final = Packing(6)


@dataclass(slots=True)
class Linear:
    """Adds products with the model's matrices to a graph.

    Args:
        graph: that grows.
        quantization: of the matrices.
    """

    graph: GraphBuilder
    quantization: Quantization
    _quantized: dict[Value, list[Value]] = field(default_factory=dict)
    _tables: dict[str, tuple[Value, Value]] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """Of activations."""
        return FLOATS.get(self.quantization, "float32")

    @property
    def smooths(self) -> bool:
        """Whether the channels that a norm returns are to be made alike in size."""
        return self.quantization == "int4-int8"

    def __call__(
        self,
        x: Value,
        name: str,
        parameters: Sequence[str],
        shape: tuple[int, int],
        *,
        exact: bool = False,
        smooth: str | None = None,
    ) -> Value:
        """Multiply [..., K] with matrices [N_i, K], joined to N outputs: [..., N].

        Args:
            x: the activations.
            name: of the stored matrix.
            parameters: of the model.
            shape: N and K.
            exact: leave out 4 bits, which are too coarse for some matrices.
            smooth: name of the factors that `x` was divided by; see `smoothing`.
        """
        if self.quantization == "int4-int8":
            stored8 = self._table(parameters[0], shape) if exact else None
            stored8 = stored8 or LAYERS.store(self.graph, name, parameters, shape, smooth=smooth)
            return self._bytes(x, *stored8)
        if self.quantization == "int8":
            return self._int8(x, name, parameters, shape)
        fits = self.dtype == "float32" or shape[1] % FUSED_INPUTS == 0
        if self.quantization.startswith("int4") and fits and not exact:
            return self._int4(x, name, parameters, shape)
        num_out, num_in = shape
        stored = Stored(name, self.dtype, (num_in, num_out))
        weights = Weights(tuple(parameters), (stored,), lambda *w: [_transposed(w, self.dtype)])
        return self.graph.op("MatMul", x, *self.graph.store(weights))

    def look_up(self, tokens: Value, name: str, shape: tuple[int, int]) -> Value:
        """Return the rows of a table [V, D] that tokens [B, W] name: [B, W, D].

        With `int4-int8`, a head that multiplies with the same table has it from here.
        """
        graph = self.graph
        if self.quantization != "int4-int8":
            stored = Stored(name, self.dtype, shape)
            weights = Weights((name,), (stored,), lambda w: [_joined([w], self.dtype)])
            return graph.op("Gather", *graph.store(weights), tokens, axis=0)
        levels, scale = self._table(name, shape)
        found = graph.op("Transpose", graph.op("Gather", levels, tokens, axis=1), perm=[1, 2, 0])
        found = graph.op("Sub", graph.op("Cast", found, to=1), graph.constant(128.0, "float32"))
        scale = graph.op("Gather", scale, tokens, axis=0)
        return graph.op("Mul", found, graph.op("Unsqueeze", scale, graph.constant([2])))

    def split(self, x: Value, sizes: Sequence[int]) -> list[Value]:
        """Cut [B, W, K] into parts to be multiplied, which are rounded by one scale for a row."""
        graph, number = self.graph, len(sizes)
        if number == 1:
            return [x]
        lengths = graph.constant(list(sizes))
        if not self.quantization.endswith("int8"):
            return graph.ops("Split", number, x, lengths, axis=2)
        levels, step = self._rows(x)
        parts = graph.ops("Split", number, levels, lengths, axis=2)
        self._quantized |= {part: [part, step] for part in parts}
        return parts

    def _table(self, name: str, shape: tuple[int, int]) -> tuple[Value, Value]:
        if name not in self._tables:
            self._tables[name] = TABLE.store(self.graph, name, [name], shape)
        return self._tables[name]

    def _bytes(self, x: Value, matrix: Value, scale: Value) -> Value:
        """Multiply with levels around 128, [K, N]; sums are integers, whatever rows there are."""
        graph = self.graph
        levels, step = self._rows(x)
        one, zero = graph.constant(1.0, "float32"), graph.constant(BYTE_ZERO, "uint8")
        inputs = levels, matrix, one, scale, zero, zero
        return graph.op("Mul", graph.op("MatMulIntegerToFloat", *inputs, domain=MICROSOFT), step)

    def _int8(
        self, x: Value, name: str, parameters: Sequence[str], shape: tuple[int, int]
    ) -> Value:
        num_out, num_in = shape
        stored = (
            Stored(f"{name}.int8", "int8", (num_in, num_out)),
            Stored(f"{name}.scale", "float32", (num_out,)),
        )
        weights = Weights(tuple(parameters), stored, lambda *w: pack_int8(w))
        matrix, scale = self.graph.store(weights)
        levels, step = self._rows(x)
        zero = self.graph.constant(128, "uint8")
        product = self.graph.op("MatMulInteger", levels, matrix, zero)
        product = self.graph.op("Mul", self.graph.op("Cast", product, to=1), step)
        return self.graph.op("Mul", product, scale)

    def _rows(self, x: Value) -> list[Value]:
        """Return uint8 levels of [..., K] around 128, and what a level is in each row, [..., 1]."""
        if x not in self._quantized:
            graph = self.graph
            largest = graph.op("ReduceMax", graph.op("Abs", x), graph.constant([-1]), keepdims=1)
            largest = graph.op("Max", largest, graph.constant(SMALLEST, "float32"))
            factor = graph.op("Div", graph.constant(ROW_MAX, "float32"), largest)
            levels = graph.op("Mul", x, factor)
            levels = graph.op("Add", levels, graph.constant(128.5, "float32"))  # the cast cuts off
            step = graph.op("Mul", largest, graph.constant(1 / ROW_MAX, "float32"))
            self._quantized[x] = [graph.op("Cast", levels, to=2), step]
        return self._quantized[x]

    def _int4(
        self, x: Value, name: str, parameters: Sequence[str], shape: tuple[int, int]
    ) -> Value:
        num_out, num_in = shape
        num_blocks = -(-num_in // INT4_BLOCK)
        stored = (
            Stored(f"{name}.int4", "uint8", (num_out, num_blocks, INT4_BLOCK // 2)),
            Stored(f"{name}.scale", self.dtype, (num_out * num_blocks,)),
        )
        weights = Weights(tuple(parameters), stored, lambda *w: pack_int4(w, self.dtype))
        return self.graph.op(
            "MatMulNBits",
            x,
            *self.graph.store(weights),
            domain=MICROSOFT,
            K=num_in,
            N=num_out,
            bits=4,
            block_size=INT4_BLOCK,
            **({"accuracy_level": 4} if self.dtype == "float32" else {}),
        )


def pack_int8(matrices: Sequence[Tensor]) -> list[Array]:
    """Return int8 [K, N] and fp32 scales [N] of matrices [N_i, K]."""
    num_out, num_in = sum(len(matrix) for matrix in matrices), matrices[0].shape[1]
    levels = np.empty((num_in, num_out), np.int8)
    scales = np.empty(num_out, np.float32)

    def convert(first: int, rows: Array) -> None:
        largest = np.abs(rows).max(axis=1)
        scale = np.where(largest > 0, largest / INT8_MAX, 1.0).astype(np.float32)
        columns = slice(first, first + len(rows))
        scales[columns] = scale
        levels[:, columns] = np.rint(rows / scale[:, None]).astype(np.int8).T

    by_rows(matrices, convert)
    return [levels, scales]


def pack_int4(matrices: Sequence[Tensor], dtype: str) -> list[Array]:
    """Return [N, blocks, 16] bytes, the lower half first, and scales [N blocks].

    A weight is (level - 8) * scale, levels 0 to 15; the largest of a block, whatever its sign, is
    level 0, so that all sixteen are of use.
    """
    num_out, num_in = sum(len(matrix) for matrix in matrices), matrices[0].shape[1]
    num_blocks = -(-num_in // INT4_BLOCK)
    packed = np.empty((num_out, num_blocks, INT4_BLOCK // 2), np.uint8)
    scales = np.empty((num_out, num_blocks), dtype)

    def convert(first: int, rows: Array) -> None:
        padding = num_blocks * INT4_BLOCK - num_in
        blocks = np.pad(rows, ((0, 0), (0, padding))).reshape(len(rows), num_blocks, INT4_BLOCK)
        at = np.abs(blocks).argmax(axis=2)[:, :, None]
        scale = (np.take_along_axis(blocks, at, axis=2)[:, :, 0] / -8).astype(dtype)
        divisor = np.where(scale == 0, 1, scale).astype(np.float32)
        levels = np.rint(blocks / divisor[:, :, None] + 8).clip(0, 15).astype(np.uint8)
        packed[first : first + len(rows)] = levels[:, :, ::2] | levels[:, :, 1::2] << 4
        scales[first : first + len(rows)] = scale

    by_rows(matrices, convert)
    return [packed, scales.reshape(-1)]


def _joined(matrices: Sequence[Tensor], dtype: str) -> Array:
    """Return [N, K] of matrices [N_i, K]."""
    return np.concatenate([matrix.to(TORCH[dtype]).numpy() for matrix in matrices])


def _transposed(matrices: Sequence[Tensor], dtype: str) -> Array:
    """Return [K, N] of matrices [N_i, K]."""
    num_out, num_in = sum(len(matrix) for matrix in matrices), matrices[0].shape[1]
    out = np.empty((num_in, num_out), dtype)

    def convert(first: int, rows: Array) -> None:
        out[:, first : first + len(rows)] = rows.T

    by_rows(matrices, convert)
    return out
