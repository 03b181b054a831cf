"""Matrices that a file holds in 4 to 6 bits a weight and a session in bytes.

On CPUs integer products of bytes cost a quarter of 4-bit ones where a step has several rows, and up
to four rows cost what one costs (bench/onnx); what counts on disk are bits. So the graph unpacks
each matrix by a few nodes over constants, which onnxruntime runs once, when it opens the session.

A matrix [N, K] is stored by blocks of 32 inputs. Each output has a scale, each block a base and a
span in levels of that scale, and each weight a code between them:

    level = base + code * span / (2**bits - 1)        rounded, -127 to 127
    weight = level * scale

Four bits of a code lie two to a byte, those beyond (`high`) by themselves. What was stored in 4
bits with a scale and a minimum for each block, as GGUF's Q4_1, keeps its codes; bases and spans are
rounded to a level.

Shapes: N outputs, K inputs, G blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from torch import Tensor

from d2f_export.onnx.graph_builder import Array, GraphBuilder, Stored, Value, Weights
from d2f_export.onnx.matrix_rows import by_rows

__all__ = ["BYTE_ZERO", "Packing", "smoothed"]

BLOCK: Final = 32
HALF: Final = BLOCK // 2
LEVEL_MAX: Final = 126.0  # bases and spans are rounded, and their sum is to stay below 128
BYTE_ZERO: Final = 128
LOW_BITS: Final = 4


@dataclass(frozen=True, slots=True)
class Packing:
    """How many bits a weight has on disk: 4, 5 or 6."""

    bits: int

    @property
    def high(self) -> int:
        """Bits of a code beyond four: 0, 1 or 2."""
        return self.bits - LOW_BITS

    @property
    def codes(self) -> int:
        """How many there are, less one."""
        return (1 << self.bits) - 1

    def store(
        self,
        graph: GraphBuilder,
        name: str,
        parameters: Sequence[str],
        shape: tuple[int, int],
        *,
        smooth: str | None = None,
    ) -> tuple[Value, Value]:
        """Add a matrix [N, K], joined of parameters; return what a session makes of it.

        Args:
            graph: that grows.
            name: of the stored matrix.
            parameters: [N_i, K] of the model.
            shape: N and K.
            smooth: name of factors [K] that the inputs' weights are multiplied with.

        Returns:
            Levels around 128, [K, N] uint8, and the scales, [N] fp32.
        """
        num_out, num_in = shape
        num_blocks = -(-num_in // BLOCK)
        stored = [
            Stored(f"{name}.low", "uint8", (num_blocks, HALF, num_out)),
            Stored(f"{name}.base", "uint8", (num_blocks, 1, num_out)),
            Stored(f"{name}.span", "uint8", (num_blocks, 1, num_out)),
            Stored(f"{name}.scale", "float32", (num_out,)),
        ]
        if self.high:
            size = (num_blocks, BLOCK * self.high // 8, num_out)
            stored.append(Stored(f"{name}.high", "uint8", size))
        sources = tuple(parameters)

        weights = Weights(sources, tuple(stored), lambda *tensors: self.pack(tensors))
        low, base, span, scale, *high = graph.store(weights)
        levels = self._levels(graph, self._codes(graph, low, high), base, span)
        levels = graph.op("Reshape", levels, graph.constant([-1, num_out]))
        if num_blocks * BLOCK > num_in:
            ends = (graph.constant([end]) for end in (0, num_in, 0))
            levels = graph.op("Slice", levels, *ends)
        if smooth is not None:
            return smoothed(graph, levels, scale, smooth, num_in)
        return in_bytes(graph, levels), scale

    def pack(self, matrices: Sequence[Tensor]) -> list[Array]:
        """Return low, base, span and scale of matrices [N_i, K], and high where there is one."""
        num_out, num_in = sum(len(matrix) for matrix in matrices), matrices[0].shape[1]
        num_blocks = -(-num_in // BLOCK)
        codes = np.empty((num_blocks, BLOCK, num_out), np.uint8)
        base, span = (np.empty((num_blocks, 1, num_out), np.uint8) for _ in range(2))
        scale = np.empty(num_out, np.float32)

        def convert(first: int, rows: Array) -> None:
            outputs = slice(first, first + len(rows))
            largest = np.abs(rows).max(axis=1)
            scale[outputs] = np.where(largest > 0, largest / LEVEL_MAX, 1.0)
            padding = num_blocks * BLOCK - num_in
            levels = np.pad(rows / scale[outputs, None], ((0, 0), (0, padding)), mode="edge")
            levels = levels.reshape(len(rows), num_blocks, BLOCK)
            lowest, highest = (end(axis=2, keepdims=True) for end in (levels.min, levels.max))
            if self.high:  # codes between the ends as a session has them; of 4 bits they are given
                lowest, highest = np.floor(lowest), np.ceil(highest)
            width = highest - lowest
            found = (levels - lowest) * self.codes / np.where(width > 0, width, 1)
            codes[:, :, outputs] = np.rint(found).transpose(1, 2, 0)
            base[:, :, outputs] = (np.rint(lowest) + BYTE_ZERO).transpose(1, 2, 0)
            span[:, :, outputs] = np.rint(width).transpose(1, 2, 0)

        by_rows(matrices, convert)
        low = codes & 15
        arrays: list[Array] = [low[:, :HALF] | low[:, HALF:] << 4, base, span, scale]
        if self.high:
            arrays.append(self._high(codes >> 4))
        return arrays

    def _high(self, bits: Array) -> Array:
        """Join the higher bits of codes, [G, 32, N], to whole bytes."""
        number = 8 // self.high
        parts = np.split(bits, number, axis=1)
        joined = np.zeros_like(parts[0])
        for index, part in enumerate(parts):
            joined |= part << (index * self.high)
        return joined

    def _codes(self, graph: GraphBuilder, low: Value, high: list[Value]) -> Value:
        """Return [G, 32, N] uint8."""

        def shifted(x: Value, by: int, direction: str) -> Value:
            amount = graph.constant([by], "uint8")
            return graph.op("BitShift", x, amount, direction=direction) if by else x

        fifteen = graph.constant([15], "uint8")
        halves = graph.op("BitwiseAnd", low, fifteen), shifted(low, 4, "RIGHT")
        codes = graph.op("Concat", *halves, axis=1)
        if not high:
            return codes
        only = graph.constant([(1 << self.high) - 1], "uint8")
        parts = (shifted(high[0], by, "RIGHT") for by in range(0, 8, self.high))
        bits = graph.op("Concat", *(graph.op("BitwiseAnd", p, only) for p in parts), axis=1)
        return graph.op("BitwiseOr", codes, shifted(bits, 4, "LEFT"))

    def _levels(self, graph: GraphBuilder, codes: Value, base: Value, span: Value) -> Value:
        """Return [G, 32, N] fp32 levels around 0, not rounded yet."""
        step = graph.op("Cast", span, to=1)
        step = graph.op("Mul", step, graph.constant(1 / self.codes, "float32"))
        start = graph.op("Cast", base, to=1)
        start = graph.op("Sub", start, graph.constant(float(BYTE_ZERO), "float32"))
        return graph.op("Add", graph.op("Mul", graph.op("Cast", codes, to=1), step), start)


def smoothed(
    graph: GraphBuilder, levels: Value, scale: Value, smooth: str, num_in: int
) -> tuple[Value, Value]:
    """Multiply inputs' weights with factors, and make the largest level of an output 126 again.

    Args:
        graph: that grows.
        levels: [K, N] fp32 around 0.
        scale: [N].
        smooth: name of the factors [K], of which fp16 holds each exactly.
        num_in: K.

    Returns:
        Levels around 128, uint8, and their scales.
    """
    stored = (Stored(f"{levels}.factor", "float16", (num_in, 1)),)
    weights = Weights((smooth,), stored, lambda factor: [factor[:, None].half().numpy()])
    levels = graph.op("Mul", levels, graph.op("Cast", *graph.store(weights), to=1))
    largest = graph.op("ReduceMax", graph.op("Abs", levels), graph.constant([0]), keepdims=0)
    largest = graph.op("Max", largest, graph.constant(1.0, "float32"))  # of zeros, too
    shrink = graph.op("Div", largest, graph.constant(LEVEL_MAX, "float32"))  # [N]
    return in_bytes(graph, graph.op("Div", levels, shrink)), graph.op("Mul", scale, shrink)


def in_bytes(graph: GraphBuilder, levels: Value) -> Value:
    """Round fp32 levels around 0 to uint8 ones around 128."""
    above = graph.constant(BYTE_ZERO + 0.5, "float32")  # the cast cuts off
    return graph.op("Cast", graph.op("Add", levels, above), to=2)
