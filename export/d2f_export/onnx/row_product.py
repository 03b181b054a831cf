"""RowProduct: rows times a matrix of bytes, as one node whose meaning the graph brings along.

It is a function of the model: onnxruntime puts its body in the node's place when it opens the
graph. A runtime that knows the function may put another kernel there, see
`d2f_runtime.backends.block_products`.

The body rounds each row to bytes by a scale of its own, so that what becomes of a row does not
depend on the rows beside it, and adds up integers. (One scale for all rows, for which onnxruntime
has a fused operator, was no faster, and four times as rough where rows differ in size.)

Shapes: M rows, N outputs, K inputs.
"""

from typing import Any, Final

import onnx.parser

from d2f_runtime.backends.block_products import DOMAIN, FINE_ROW_PRODUCT, ROW_PRODUCT

__all__ = ["row_products"]

ROW_MAX: Final = 127.0
HEAD: Final = '<domain: "{domain}", opset_import: ["": {opset}, "com.microsoft": 1]>'
ROUNDED: Final = """
    last = Constant <value_ints = [-1]> ()
    share = Constant <value_float = {share}> ()
    one = Constant <value_float = 1.0> ()
    zero = Constant <value = uint8 {{128}}> ()
    sizes = Abs (x)
    largest = ReduceMax (sizes, last)
    step = Mul (largest, share)
    shape = Shape (step)
    zeros = Expand (zero, shape)
    rows = QuantizeLinear <axis = -1, block_size: int = @K> (x, step, zeros)
    sums = com.microsoft.MatMulIntegerToFloat (rows, levels, one, scale, zero{matrix_zero})
    product = Mul (sums, step)
"""
REST: Final = """
    middle = Constant <value_float = 128.0> ()
    numbers = Cast <to = 1> (rows)
    around = Sub (numbers, middle)
    near = Mul (around, step)
    rest = Sub (x, near)
    more = {domain}.{name} <K: int = @K, N: int = @N> (rest, levels, scale)
    y = Add (product, more)
"""


def row_products(opset: int, *, unsigned: bool) -> list[Any]:
    """Return the FunctionProtos of RowProduct and FineRowProduct.

    Both take x [..., K] fp32, levels [K, N] and their scales [N] fp32, have the attributes K and N,
    and give [..., N]. A row of zeros has levels that mean nothing, of 0 each. FineRowProduct
    multiplies what rounding cuts off, too.

    Args:
        opset: of the model.
        unsigned: levels are uint8 around 128, not int8 around 0.
    """
    fields = {
        "domain": DOMAIN,
        "name": ROW_PRODUCT,
        "opset": opset,
        "share": repr(1 / ROW_MAX),
        "matrix_zero": ", zero" if unsigned else "",
    }
    bodies = {
        ROW_PRODUCT: ROUNDED.replace("product =", "y ="),
        FINE_ROW_PRODUCT: ROUNDED + REST,
    }
    found = []
    for name, body in bodies.items():
        head = HEAD if name == ROW_PRODUCT else HEAD.replace("]", ', "{domain}": 1]')
        text = f"{head}\n{name} <K, N> (x, levels, scale) => (y) {{{{{body}}}}}"
        found.append(onnx.parser.parse_function(text.format(**fields)))
    return found
