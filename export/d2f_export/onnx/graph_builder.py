"""GraphBuilder: an ONNX graph node by node, with weights that are made only when they are stored.

The graph is known before the first weight is read, so that a model larger than memory is written
piece by piece. Knows ONNX, not transformers; needs neither torch nor onnxscript.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

__all__ = ["MICROSOFT", "OPSET", "Array", "GraphBuilder", "Stored", "Value", "Weights"]

OPSET: Final = 23
IR_VERSION: Final = 10  # of the release that brought the opset
MICROSOFT: Final = "com.microsoft"

Array = npt.NDArray[Any]
Value = str  # the name of a tensor in the graph


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight as it is stored: its name in the graph, dtype and shape."""

    name: Value
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Weights:
    """Stored tensors that are made together.

    Attributes:
        sources: parameters of the model, by name.
        stored: what is made of them.
        pack: makes the stored arrays, in order, of the parameters.
    """

    sources: tuple[str, ...]
    stored: tuple[Stored, ...]
    pack: Callable[..., Sequence[Array]]


class GraphBuilder:
    """A graph that grows by its nodes.

    Attributes:
        weights: in the order in which they are stored.
    """

    def __init__(self) -> None:
        self.weights: list[Weights] = []
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}
        self._functions: dict[str, Any] = {}
        self._num_values = 0

    def op(self, kind: str, /, *inputs: Value, domain: str = "", **attributes: object) -> Value:
        """Add a node with one output."""
        return self.ops(kind, 1, *inputs, domain=domain, **attributes)[0]

    def ops(
        self, kind: str, number: int, /, *inputs: Value, domain: str = "", **attributes: object
    ) -> list[Value]:
        """Add a node with a number of outputs; an empty input is one that is left out."""
        self._num_values += 1
        outputs = [f"{kind}_{self._num_values}.{i}" for i in range(number)]
        name = f"{kind}_{self._num_values}"
        node = helper.make_node(kind, inputs, outputs, name=name, domain=domain, **attributes)
        self._nodes.append(node)
        return outputs

    def define(self, functions: Sequence[Any]) -> None:
        """Bring FunctionProtos along, each name's once."""
        self._functions |= {function.name: function for function in functions}

    def rename(self, value: Value, name: Value) -> Value:
        """Give a node's output another name, also where it is read; return the name."""
        for node in self._nodes:
            for values in (node.input, node.output):
                for index, found in enumerate(values):
                    if found == value:
                        values[index] = name
        return name

    def constant(self, value: object, dtype: str = "int64") -> Value:
        """Add a small constant; equal ones are one."""
        array = np.asarray(value, dtype=dtype)
        key = hashlib.sha256(array.tobytes()).hexdigest()[:12]
        name = f"constant.{dtype}.{'x'.join(map(str, array.shape))}.{key}"
        if name not in self._constants:
            self._constants[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def store(self, weights: Weights) -> tuple[Value, ...]:
        """Add weights."""
        self.weights.append(weights)
        return tuple(stored.name for stored in weights.stored)

    @contextmanager
    def branch(self, name: str, into: dict[str, Any]) -> Any:
        """Collect the nodes that are added meanwhile as the subgraph `into[name]`.

        Its output is the last node's; subgraphs read everything that is before them.
        """
        outer, self._nodes = self._nodes, []
        yield
        output = helper.make_empty_tensor_value_info(self._nodes[-1].output[0])
        into[name] = helper.make_graph(self._nodes, name, [], [output])
        self._nodes = outer

    def model(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        """Return the ModelProto; its weights are declared but hold no data.

        Args:
            inputs: value infos, in order.
            outputs: value infos, in order.
        """
        constants = list(self._constants.values())
        graph = helper.make_graph(self._nodes, "step", inputs, outputs, initializer=constants)
        for weights in self.weights:
            for stored in weights.stored:
                tensor = graph.initializer.add()
                tensor.name = stored.name
                tensor.data_type = helper.np_dtype_to_tensor_dtype(np.dtype(stored.dtype))
                tensor.dims.extend(stored.shape)
        functions = self._functions.values()
        domains = {node.domain for node in self._nodes}
        domains |= {function.domain for function in functions}
        imports = [helper.make_opsetid("", OPSET)]
        imports += [helper.make_opsetid(domain, 1) for domain in sorted(domains - {""})]
        return helper.make_model(
            graph,
            functions=list(functions),
            opset_imports=imports,
            ir_version=IR_VERSION,
            producer_name="d2f-stream",
        )
