"""ONNX's messages, as far as a graph is rearranged before onnxruntime reads it.

Field numbers are those of onnx.proto3.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from d2f_runtime.backends.protobuf import Part, fields_of, holding, number, number_in, text

__all__ = [
    "ATTRIBUTE",
    "DOMAIN",
    "GRAPH",
    "INITIALIZER",
    "INPUTS",
    "KIND",
    "MICROSOFT",
    "NAME",
    "NODE",
    "OUTPUT",
    "OUTPUTS",
    "TENSOR_NAME",
    "VALUE_NAME",
    "integers_of",
    "model",
    "node",
    "read_within",
    "tensor",
    "text_of",
    "texts_of",
    "value",
]

IR_VERSION, GRAPH, IMPORT = 1, 7, 8  # of ModelProto
IMPORTED_VERSION: Final = 2  # of OperatorSetIdProto
NODE, NAME, INITIALIZER, INPUT, OUTPUT = 1, 2, 5, 11, 12  # of GraphProto
INPUTS, OUTPUTS, KIND, ATTRIBUTE, DOMAIN = 1, 2, 4, 5, 7  # of NodeProto
ATTRIBUTE_NAME, INTEGER, BODY, BODIES, ATTRIBUTE_TYPE = 1, 3, 6, 11, 20  # of AttributeProto
IS_INTEGER: Final = 2
DIMS, DATA_TYPE, TENSOR_NAME, RAW_DATA = 1, 2, 8, 9  # of TensorProto
VALUE_NAME, VALUE_TYPE = 1, 2  # of ValueInfoProto
TENSOR_TYPE: Final = 1  # of TypeProto
ELEMENT_TYPE: Final = 1  # of TypeProto.Tensor
MICROSOFT: Final = "com.microsoft"
TYPES: Final = {"float32": 1, "uint8": 2, "int64": 7}


def text_of(message: memoryview, key: int) -> str:
    """Return a field that holds a string; empty where there is none."""
    return next((str(f.value, "utf-8") for f in fields_of(message) if f.key == key), "")


def integers_of(node: memoryview) -> dict[str, int]:
    """Return the attributes of a NodeProto that are an integer, from 0 on."""
    found: dict[str, int] = {}
    for attribute in (f.value for f in fields_of(node) if f.key == ATTRIBUTE):
        for part in fields_of(attribute):
            if part.key == INTEGER:
                found[text_of(attribute, ATTRIBUTE_NAME)] = number_in(part)
    return found


def texts_of(message: memoryview, key: int) -> tuple[str, ...]:
    """Return the strings of a repeated field, without empty ones."""
    return tuple(str(f.value, "utf-8") for f in fields_of(message) if f.key == key and f.value)


def read_within(node: memoryview) -> Iterator[str]:
    """Yield the names that the subgraphs of a NodeProto read."""
    attributes = (f.value for f in fields_of(node) if f.key == ATTRIBUTE)
    bodies = (f.value for a in attributes for f in fields_of(a) if f.key in (BODY, BODIES))
    for found in (f.value for body in bodies for f in fields_of(body) if f.key == NODE):
        yield from texts_of(found, INPUTS)
        yield from read_within(found)


def node(kind: str, inputs: Sequence[str], output: str, domain: str = "", **integers: int) -> bytes:
    """Return a NodeProto with one output."""
    parts: list[Part] = [text(INPUTS, name) for name in inputs]
    parts += [text(OUTPUTS, output), text(KIND, kind), text(DOMAIN, domain)]
    for name, integer in integers.items():
        facts = [text(ATTRIBUTE_NAME, name), number(INTEGER, integer)]
        parts += holding(ATTRIBUTE, [*facts, number(ATTRIBUTE_TYPE, IS_INTEGER)])
    return b"".join(parts)


def tensor(name: str, array: Any, kind: int | None = None) -> list[Part]:
    """Return the parts of a TensorProto.

    Args:
        name: of the tensor.
        array: of fp32, uint8 or int64 where `kind` is None.
        kind: ONNX's number of the dtype, where it is another.
    """
    facts: list[Part] = [number(DIMS, size) for size in array.shape]
    facts += [number(DATA_TYPE, kind or TYPES[str(array.dtype)]), text(TENSOR_NAME, name)]
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return [*facts, *holding(RAW_DATA, [data])]


def value(name: str, dtype: str) -> bytes:
    """Return a ValueInfoProto of a tensor of any shape."""
    of_tensor = holding(TENSOR_TYPE, [number(ELEMENT_TYPE, TYPES[dtype])])
    return b"".join([text(VALUE_NAME, name), *holding(VALUE_TYPE, of_tensor)])


def model(
    nodes: Sequence[bytes], tensors: Sequence[bytes], inputs: Sequence[bytes], output: bytes
) -> bytes:
    """Return a ModelProto of opset 23 with onnxruntime's own operators.

    Args:
        nodes: NodeProtos.
        tensors: TensorProtos, constants.
        inputs: ValueInfoProtos.
        output: a ValueInfoProto.
    """
    parts: list[Part] = [part for found in nodes for part in holding(NODE, [found])]
    parts += [text(NAME, "graph")]
    parts += [part for found in tensors for part in holding(INITIALIZER, [found])]
    parts += [part for found in inputs for part in holding(INPUT, [found])]
    parts += holding(OUTPUT, [output])
    imports: list[Part] = []
    for domain, version in (("", 23), (MICROSOFT, 1)):
        imports += holding(IMPORT, [text(1, domain), number(IMPORTED_VERSION, version)])
    return b"".join([number(IR_VERSION, 10), *holding(GRAPH, parts), *imports])
