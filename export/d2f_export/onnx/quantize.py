"""How a matrix is stored in a step graph and multiplied there.

`fp32` and `fp16`: as it is. `int8`: dynamic quantization, weights per output channel, activations
per row at run time, see `row_product`. On CPUs it was the fastest of what onnxruntime offers at
every window size but one row (bench/onnx), because D2F windows are bound by arithmetic and the
integer kernels do more of it. `int4`: blocks of 32 weights with one scale each, which onnxruntime's
MatMulNBits reads; symmetric, the form for which its CUDA kernels are built. With fp16 activations a
matrix whose inputs are no multiple of 64 stays in fp16: fused CUDA kernels would take it and fail.
`int4-int8`: 4 bits in the file and 8 in memory, see `packed`; activations as with `int8`. Its table
of embeddings, which may be the head too, has 6 bits.

Without VNNI, x86 kernels add two u8 x s8 products in 16 bits, which `int8` weights of 8 bits
overflow silently. So two neighbouring ones of an output are 128 levels together at most, which
leaves the largest some 100. Those of `int4-int8` are unsigned, which kernels add up in 32 bits:
signed ones saved 3 to 8 % of a step, and cost SmolLM2-135M 0.6 % of perplexity.

Shapes: N outputs, K inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

import numpy as np

from d2f_export.onnx.graph_builder import MICROSOFT, OPSET, GraphBuilder, Stored, Value, Weights
from d2f_export.onnx.packed import BYTE_ZERO, Packing, smoothed
from d2f_export.onnx.row_product import row_products
from d2f_export.onnx.whole_matrices import INT4_BLOCK, joined, pack_int4, pack_int8, transposed
from d2f_runtime.backends.block_products import DOMAIN, FINE_ROW_PRODUCT, ROW_PRODUCT

__all__ = ["FLOATS", "QUANTIZATIONS", "Linear", "Quantization"]

Quantization = Literal["fp32", "fp16", "int8", "int4", "int4-fp16", "int4-int8"]
QUANTIZATIONS: Final[tuple[Quantization, ...]] = get_args(Quantization)
FLOATS: Final = {"fp16": "float16", "int4-fp16": "float16"}  # of activations; else float32

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
    _tables: dict[str, tuple[Value, Value]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.in_bytes:
            self.graph.define(row_products(OPSET, unsigned=self.smooths))

    @property
    def dtype(self) -> str:
        """Of activations."""
        return FLOATS.get(self.quantization, "float32")

    @property
    def in_bytes(self) -> bool:
        """Whether products are of integers, which onnxruntime's CPU kernels alone run."""
        return self.quantization.endswith("int8")

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
        twice: bool = False,
    ) -> Value:
        """Multiply [..., K] with matrices [N_i, K], joined to N outputs: [..., N].

        Args:
            x: the activations.
            name: of the stored matrix.
            parameters: of the model.
            shape: N and K.
            exact: leave out 4 bits, which are too coarse for some matrices.
            smooth: name of the factors that `x` was divided by; see `smoothing`.
            twice: where rows are rounded to bytes, multiply what that cuts off, too.
        """
        if self.in_bytes:
            matrix = self._matrix(name, parameters, shape, exact=exact, smooth=smooth)
            return self._product(x, matrix, shape, fine=twice and self.smooths)
        fits = self.dtype == "float32" or shape[1] % FUSED_INPUTS == 0
        if self.quantization.startswith("int4") and fits and not exact:
            return self._int4(x, name, parameters, shape)
        num_out, num_in = shape
        stored = Stored(name, self.dtype, (num_in, num_out))
        weights = Weights(tuple(parameters), (stored,), lambda *w: [transposed(w, self.dtype)])
        return self.graph.op("MatMul", x, *self.graph.store(weights))

    def look_up(self, tokens: Value, name: str, shape: tuple[int, int]) -> Value:
        """Return the rows of a table [V, D] that tokens [B, W] name: [B, W, D].

        With `int4-int8`, a head that multiplies with the same table has it from here.
        """
        graph = self.graph
        if self.quantization != "int4-int8":
            stored = Stored(name, self.dtype, shape)
            weights = Weights((name,), (stored,), lambda w: [joined([w], self.dtype)])
            return graph.op("Gather", *graph.store(weights), tokens, axis=0)
        levels, scale = self._table(name, shape)
        found = graph.op("Transpose", graph.op("Gather", levels, tokens, axis=1), perm=[1, 2, 0])
        zero = graph.constant(float(BYTE_ZERO), "float32")
        found = graph.op("Sub", graph.op("Cast", found, to=1), zero)
        scale = graph.op("Gather", scale, tokens, axis=0)
        return graph.op("Mul", found, graph.op("Unsqueeze", scale, graph.constant([2])))

    def by_parts(
        self, x: Value, names: Sequence[str], shapes: Sequence[tuple[int, int]], only: Value
    ) -> Value:
        """Multiply consecutive parts of [B, W, K] with a matrix each: [B, W, sum N_i].

        Args:
            x: the activations.
            names: of the matrices, as stored and in the model.
            shapes: N_i and K_i of each; one whose K_i is 0 is not stored and gives zeros.
            only: [B, W, 1], 1 in the rows that are wanted and 0 in the others, which get zeros.
        """
        graph = self.graph
        parts = list(zip(names, shapes, strict=True))
        x = graph.op("Mul", x, only)
        if self.in_bytes:
            num_out, num_in = (sum(sizes) for sizes in zip(*shapes, strict=True))
            return self._product(x, self._diagonal(parts), (num_out, num_in))
        sizes = [num_in for _, (_, num_in) in parts if num_in]
        pieces = graph.ops("Split", len(sizes), x, graph.constant(sizes), axis=2)
        products: list[Value] = []
        for name, (num_out, num_in) in parts:
            if num_in:
                products.append(self(pieces.pop(0), name, [name], (num_out, num_in)))
            else:
                nothing = graph.constant(np.zeros((1, 1, num_out)), self.dtype)
                products.append(graph.op("Mul", nothing, only))
        return products[0] if len(products) == 1 else graph.op("Concat", *products, axis=2)

    def _diagonal(self, parts: Sequence[tuple[str, tuple[int, int]]]) -> tuple[Value, Value]:
        """Return the matrix, [sum K_i, sum N_i], and scales that `by_parts` multiplies with."""
        graph = self.graph
        total = sum(num_out for _, (num_out, _) in parts)
        levels: list[Value] = []
        scales: list[Value] = []
        first = 0
        for name, (num_out, num_in) in parts:
            after = total - first - num_out
            if num_in:
                part, scale = self._matrix(name, [name], (num_out, num_in))
                if total > num_out:  # a session pads it once, when it opens
                    pads = graph.constant([0, first, 0, after])
                    zero = [graph.constant(BYTE_ZERO, "uint8")] if self.smooths else []
                    part = graph.op("Pad", part, pads, *zero)
                levels.append(part)
                scales.append(scale)
            else:
                scales.append(graph.constant(np.ones(num_out), "float32"))
            first += num_out
        if len(levels) > 1:
            levels = [graph.op("Concat", *levels, axis=0)]
        if len(scales) > 1:
            scales = [graph.op("Concat", *scales, axis=0)]
        return levels[0], scales[0]

    def _table(self, name: str, shape: tuple[int, int]) -> tuple[Value, Value]:
        if name not in self._tables:
            self._tables[name] = TABLE.store(self.graph, name, [name], shape)
        return self._tables[name]

    def _matrix(
        self,
        name: str,
        parameters: Sequence[str],
        shape: tuple[int, int],
        *,
        exact: bool = False,
        smooth: str | None = None,
    ) -> tuple[Value, Value]:
        """Return levels [K, N], and their scales [N]."""
        graph, (num_out, num_in) = self.graph, shape
        if self.quantization == "int4-int8":
            if exact:
                table = self._table(parameters[0], shape)
                return table if smooth is None else self._smoothed(table, smooth, num_in)
            return LAYERS.store(graph, name, parameters, shape, smooth=smooth)
        stored = (
            Stored(f"{name}.int8", "int8", (num_in, num_out)),
            Stored(f"{name}.scale", "float32", (num_out,)),
        )
        matrix, scale = graph.store(Weights(tuple(parameters), stored, lambda *w: pack_int8(w)))
        return matrix, scale

    def _smoothed(
        self, table: tuple[Value, Value], smooth: str, num_in: int
    ) -> tuple[Value, Value]:
        """Return a table's levels and scales once more, of which a head has another copy."""
        graph, (levels, scale) = self.graph, table
        zero = graph.constant(float(BYTE_ZERO), "float32")
        levels = graph.op("Sub", graph.op("Cast", levels, to=1), zero)
        return smoothed(graph, levels, scale, smooth, num_in)

    def _product(
        self, x: Value, matrix: tuple[Value, Value], shape: tuple[int, int], *, fine: bool = False
    ) -> Value:
        """Multiply with levels [K, N] and their scales."""
        num_out, num_in = shape
        kind = FINE_ROW_PRODUCT if fine else ROW_PRODUCT
        return self.graph.op(kind, x, *matrix, domain=DOMAIN, K=num_in, N=num_out)

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
