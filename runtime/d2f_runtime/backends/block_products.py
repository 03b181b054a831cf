"""Row products as onnxruntime's products of blocks, where this machine has a kernel for them.

An exported graph multiplies rows with a matrix of bytes by a function that it brings along (see
`d2f_export.onnx.row_product`), of some ten nodes. onnxruntime's MatMulNBits is one node that rounds
64 inputs of a row at a time, so it is faster and rounds more finely; but where it has no kernel for
bytes it makes floats of the whole matrix in each step, which takes ten times as long.

Shapes: N outputs, K inputs.
"""

from collections.abc import Sequence
from functools import cache
from typing import Final

import numpy as np
import onnxruntime as ort

from d2f_runtime.backends import onnx_messages as onnx

__all__ = ["DOMAIN", "FINE_ROW_PRODUCT", "ROW_PRODUCT", "block_product", "has_block_products"]

DOMAIN: Final = "d2f"
ROW_PRODUCT: Final = "RowProduct"
FINE_ROW_PRODUCT: Final = "FineRowProduct"

BLOCK: Final = 64
BITS: Final = 8
ZERO: Final = 128
IN_BYTES: Final = 4  # accuracy_level of MatMulNBits: rows are rounded to bytes


def block_product(node: memoryview) -> tuple[list[bytes], list[bytes]] | None:
    """Return what to put into a row product's place; None where the node is none.

    Args:
        node: a NodeProto.

    Returns:
        NodeProtos, of which all but the last are over constants, and TensorProtos that they read.
    """
    if onnx.text_of(node, onnx.DOMAIN) != DOMAIN:
        return None
    if onnx.text_of(node, onnx.KIND) not in (ROW_PRODUCT, FINE_ROW_PRODUCT):
        return None
    x, levels, scale = onnx.texts_of(node, onnx.INPUTS)
    output = onnx.text_of(node, onnx.OUTPUTS)
    sizes = onnx.integers_of(node)
    num_blocks = -(-sizes["K"] // BLOCK)
    name = f"{DOMAIN}.{output}"
    shapes = {
        "missing": [0, 0, num_blocks * BLOCK - sizes["K"], 0],  # behind the inputs
        "blocks": [sizes["N"], num_blocks, BLOCK],
        "column": [-1, 1],
        "times": [1, num_blocks],
        "flat": [-1],
    }
    constants = {key: np.array(shape, np.int64) for key, shape in shapes.items()}
    constants["zero"] = np.array(ZERO, np.uint8)
    names = {key: f"{DOMAIN}.{sizes['K']}.{sizes['N']}.{key}" for key in constants}
    steps = [
        ("Pad", levels, ("missing", "zero"), "whole"),
        ("Transpose", f"{name}.whole", (), "turned"),
        ("Reshape", f"{name}.turned", ("blocks",), "bytes"),
        ("Reshape", scale, ("column",), "standing"),
        ("Expand", f"{name}.standing", ("times",), "spread"),
        ("Reshape", f"{name}.spread", ("flat",), "scales"),
    ]
    nodes = [
        onnx.node(kind, [first, *(names[c] for c in read)], f"{name}.{made}")
        for kind, first, read, made in steps
    ]
    inputs = [x, f"{name}.bytes", f"{name}.scales"]
    nodes.append(_product(inputs, output, sizes["K"], sizes["N"]))
    return nodes, [b"".join(onnx.tensor(names[key], array)) for key, array in constants.items()]


@cache
def has_block_products() -> bool:
    """Return whether onnxruntime multiplies blocks here as this project needs it.

    Its kernel is to round rows to bytes, which loses a small value beside a large one: without a
    kernel the product is one of floats, which keeps it. And a row is to have the same bits whatever
    rows are beside it, which is so with some sizes of blocks and not with others.
    """
    draws = np.random.default_rng(0)
    num_rows, num_blocks, num_out = 8, 9, 48
    weights = draws.integers(0, 256, (num_out, num_blocks, BLOCK), np.uint8)
    weights[:, 0] = ZERO
    weights[:, 0, 1] += 100  # of the small value; nothing of the large one
    tensors = {"bytes": weights, "scales": draws.random(weights[..., 0].size, np.float32) + 1}
    data = onnx.model(
        [_product(["x", "bytes", "scales"], "y", num_blocks * BLOCK, num_out)],
        [b"".join(onnx.tensor(name, array)) for name, array in tensors.items()],
        [onnx.value("x", "float32")],
        onnx.value("y", "float32"),
    )
    rows = draws.standard_normal((num_rows, num_blocks * BLOCK), np.float32)
    rows[0] = 0.0
    rows[0, :2] = 1.0, 1e-3
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # releases without the operator say so at length
    try:
        session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        alone = np.concatenate([session.run(None, {"x": row[None]})[0] for row in rows])
        together = [session.run(None, {"x": rows[:number]})[0] for number in (2, 3, 4, 6, num_rows)]
    except Exception:  # onnxruntime's errors have no common base but this
        return False
    rounds = np.abs(alone[0]).max() < 0.05  # of at least 0.1
    return bool(rounds) and all(np.array_equal(y, alone[: len(y)]) for y in together)


def _product(inputs: Sequence[str], output: str, num_in: int, num_out: int) -> bytes:
    sizes = {"K": num_in, "N": num_out, "bits": BITS, "block_size": BLOCK}
    how = {"accuracy_level": IN_BYTES}
    return onnx.node("MatMulNBits", inputs, output, onnx.MICROSOFT, **sizes, **how)
