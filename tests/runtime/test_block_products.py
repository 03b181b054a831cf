"""Products of blocks in row products' places: as exact as rounding allows, and rows alone.

The oracle is the product in fp64 with what the bytes stand for.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from d2f_export.onnx.graph_builder import OPSET, GraphBuilder
from d2f_export.onnx.row_product import row_products
from d2f_runtime.backends import onnx_messages
from d2f_runtime.backends.block_products import (
    DOMAIN,
    FINE_ROW_PRODUCT,
    ROW_PRODUCT,
    has_block_products,
)
from d2f_runtime.backends.unpacked_graph import open_unpacked

pytestmark = pytest.mark.torch  # which the export's extra brings

CPU = ["CPUExecutionProvider"]
BLOCK = 64

needs_kernel = pytest.mark.skipif(
    not has_block_products(), reason="onnxruntime has no kernel for products of blocks here"
)


class Product:
    """A random matrix of bytes [K, N] and the graph of one product with it."""

    def __init__(self, folder: Path, kind: str, num_in: int, num_out: int) -> None:
        draws = np.random.default_rng(num_in + num_out)
        self.levels = draws.integers(0, 256, (num_in, num_out), np.uint8)
        self.scale = draws.uniform(0.01, 0.1, num_out).astype(np.float32)
        self.rows = draws.standard_normal((1, 9, num_in)).astype(np.float32)
        graph = GraphBuilder()
        graph.define(row_products(OPSET, unsigned=True))
        names = "x", "levels", "scale"
        out = graph.op(kind, *names, domain=DOMAIN, K=num_in, N=num_out)
        model = graph.model(
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "rows", num_in])],
            [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)],
        )
        for name, array in (("levels", self.levels), ("scale", self.scale)):
            model.graph.initializer.append(numpy_helper.from_array(array, name))
        self.path = folder / "model.onnx"
        onnx.save(model, self.path)

    @property
    def weights(self) -> Any:
        return (self.levels.astype(np.float64) - 128) * self.scale

    def exact(self) -> Any:
        return self.rows.astype(np.float64) @ self.weights

    def allowed(self, num_rounded: int) -> Any:
        """Return what rounding so many inputs at a time by one scale can change at most."""
        num_in = len(self.levels)
        padded = np.pad(np.abs(self.rows), ((0, 0), (0, 0), (0, -num_in % num_rounded)))
        largest = padded.reshape(*padded.shape[:2], -1, num_rounded).max(axis=-1)
        half = np.repeat(largest / 127 / 2, num_rounded, axis=-1)[..., :num_in]
        return half @ np.abs(self.weights) * 1.001 + 1e-6

    def session(self, *, in_blocks: bool) -> ort.InferenceSession:
        return open_unpacked(self.path, ort.SessionOptions(), CPU, in_blocks=in_blocks)


SHAPES = [(64, 16), (576, 40), (96, 33), (40, 7), (130, 1)]


@pytest.mark.parametrize(("num_in", "num_out"), SHAPES)
@pytest.mark.parametrize("kind", [ROW_PRODUCT, FINE_ROW_PRODUCT])
def test_the_graphs_own_product_rounds_rows(
    tmp_path: Path, kind: str, num_in: int, num_out: int
) -> None:
    product = Product(tmp_path, kind, num_in, num_out)
    (found,) = product.session(in_blocks=False).run(None, {"x": product.rows})
    allowed = product.allowed(num_in)
    if kind == FINE_ROW_PRODUCT:
        allowed = allowed / 100
    assert (np.abs(found - product.exact()) <= allowed).all()


@needs_kernel
@pytest.mark.parametrize(("num_in", "num_out"), SHAPES)
@pytest.mark.parametrize("kind", [ROW_PRODUCT, FINE_ROW_PRODUCT])
def test_a_product_of_blocks_rounds_each_block(
    tmp_path: Path, kind: str, num_in: int, num_out: int
) -> None:
    product = Product(tmp_path, kind, num_in, num_out)
    product.rows[..., 0] = 100  # beside which others lose all that they are, in one block alone
    (found,) = product.session(in_blocks=True).run(None, {"x": product.rows})
    assert (np.abs(found - product.exact()) <= product.allowed(BLOCK)).all()


@needs_kernel
def test_a_row_has_the_same_bits_beside_any_others(tmp_path: Path) -> None:
    product = Product(tmp_path, ROW_PRODUCT, 576, 1056)
    session = product.session(in_blocks=True)
    alone = [session.run(None, {"x": product.rows[:, i : i + 1]})[0] for i in range(9)]
    for number in range(2, 10):
        (found,) = session.run(None, {"x": product.rows[:, :number]})
        assert np.array_equal(found, np.concatenate(alone[:number], axis=1))


@pytest.mark.parametrize("in_blocks", [False, pytest.param(True, marks=needs_kernel)])
def test_rows_of_zeros_give_zeros(tmp_path: Path, in_blocks: bool) -> None:
    product = Product(tmp_path, ROW_PRODUCT, 96, 33)
    product.rows[:, 3] = 0
    (found,) = product.session(in_blocks=in_blocks).run(None, {"x": product.rows})
    assert not found[:, 3].any()
    assert np.isfinite(found).all()


def test_messages_are_those_that_onnx_reads() -> None:
    array = np.arange(6, dtype=np.int64).reshape(2, 3)
    data = onnx_messages.model(
        [onnx_messages.node("Gather", ["table", "at"], "y", axis=1)],
        [b"".join(onnx_messages.tensor("table", array))],
        [onnx_messages.value("at", "int64")],
        onnx_messages.value("y", "int64"),
    )
    model = onnx.load_model_from_string(data)
    assert numpy_helper.to_array(model.graph.initializer[0]).tolist() == array.tolist()
    (found,) = ort.InferenceSession(data).run(None, {"at": np.array([2, 0])})
    assert found.tolist() == [[2, 0], [5, 3]]
