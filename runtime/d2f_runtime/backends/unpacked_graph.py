"""A step graph whose packed weights are unpacked matrix by matrix before onnxruntime reads it.

A graph of `int4-int8` makes bytes of its weights by nodes over constants. onnxruntime runs those
once, when it opens a session, but keeps all that they return until the last has run: 25 times the
weights as they are stored. Here the nodes that make one matrix are a graph of their own, which
onnxruntime runs and closes before the next; the step graph gets the results in their place. So
results are the same bits, and the file stays a graph that any onnxruntime opens.
"""

import mmap
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import onnxruntime as ort

from d2f_runtime.backends import onnx_messages as onnx
from d2f_runtime.backends.block_products import block_product
from d2f_runtime.backends.protobuf import Field, Part, fields_of, holding, text
from d2f_runtime.backends.settled_memory import give_back

__all__ = ["open_unpacked"]

AT_ONCE: Final = 4 << 20  # bytes of weights, or one matrix
FOLDER: Final = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True, slots=True)
class _Node:
    whole: memoryview
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    inner: tuple[str, ...]
    """What its subgraphs read."""


@dataclass(slots=True)
class _Piece:
    """Nodes that are to run once, together.

    Attributes:
        nodes: in order.
        outputs: what others read of theirs.
    """

    nodes: list[_Node] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


class _Graph:
    """A ModelProto's graph, with the names that its nodes read and give.

    Args:
        data: the ModelProto.
        in_blocks: put products of blocks into row products' places.
    """

    def __init__(self, data: memoryview, *, in_blocks: bool) -> None:
        model = list(fields_of(data))
        self.around = [found.whole for found in model if found.key != onnx.GRAPH]
        self.rest: list[Field] = []  # of the graph
        self.nodes: list[_Node] = []
        self.stored: dict[str, memoryview] = {}  # initializers
        for found in (part for f in model if f.key == onnx.GRAPH for part in fields_of(f.value)):
            if found.key == onnx.NODE:
                self._add_node(found, in_blocks)
            elif found.key == onnx.INITIALIZER:
                self.stored[onnx.text_of(found.value, onnx.TENSOR_NAME)] = found.whole
            else:
                self.rest.append(found)

    def _add_node(self, found: Field, in_blocks: bool) -> None:
        instead = block_product(found.value) if in_blocks else None
        if instead is None:
            self.nodes.append(_node(found))
            return
        nodes, tensors = instead
        self.nodes += [_node(made) for made in _fields(onnx.NODE, nodes)]
        for made in _fields(onnx.INITIALIZER, tensors):
            self.stored[onnx.text_of(made.value, onnx.TENSOR_NAME)] = made.whole

    def bytes_of(self, nodes: Sequence[_Node], others: Sequence[Part]) -> bytes:
        """Return a ModelProto of some nodes, the initializers they read, and other fields."""
        read = dict.fromkeys(name for node in nodes for name in (*node.inputs, *node.inner))
        stored = [self.stored[name] for name in read if name in self.stored]
        body = [*others, *(node.whole for node in nodes), *stored]
        return b"".join([*self.around, *holding(onnx.GRAPH, body)])

    def pieces(self) -> list[_Piece]:
        """Return the nodes over constants: those that belong together, some matrices at a time."""
        pieces = [_Piece()]
        size = 0
        for nodes in self._constant():
            if size >= AT_ONCE:
                pieces.append(_Piece())
                size = 0
            pieces[-1].nodes += nodes
            read = {name for node in nodes for name in node.inputs}
            size += sum(len(self.stored[name]) for name in read if name in self.stored)
        done = {id(node) for piece in pieces for node in piece.nodes}
        others = (node for node in self.nodes if id(node) not in done)
        needed = {name for node in others for name in (*node.inputs, *node.inner)}
        needed |= {
            onnx.text_of(part.value, onnx.VALUE_NAME)
            for part in self.rest
            if part.key == onnx.OUTPUT
        }
        for piece in pieces:
            made = (name for node in piece.nodes for name in node.outputs)
            piece.outputs = [name for name in made if name in needed]
        return [piece for piece in pieces if piece.outputs]

    def _constant(self) -> Iterable[list[_Node]]:
        """Return the nodes over constants; those that read one another's values are together."""
        together: dict[str, list[_Node]] = {}  # by the values that they make
        for node in self.nodes:
            known = all(name in self.stored or name in together for name in node.inputs)
            if not known or node.inner or not node.inputs:
                continue
            before = {id(found): found for name in node.inputs if (found := together.get(name))}
            group = [other for found in before.values() for other in found] + [node]
            together |= {name: group for other in group for name in other.outputs}
        return {id(group): group for group in together.values()}.values()


def open_unpacked(
    path: Path, options: ort.SessionOptions, providers: Sequence[Any], *, in_blocks: bool
) -> ort.InferenceSession:
    """Return the session of a graph, as onnxruntime alone would open it.

    Args:
        path: of the graph.
        options: of the session.
        providers: as onnxruntime takes them.
        in_blocks: put products of blocks into row products' places; see `block_products`.

    Raises:
        ValueError: the file is no graph.
        Exception: of onnxruntime, where it is none that it runs.
    """
    options.add_session_config_entry(FOLDER, str(path.parent))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    graph = _Graph(memoryview(mapped), in_blocks=in_blocks)
    unpacked = _unpacked(graph, path.parent, options.intra_op_num_threads)
    del graph, mapped
    give_back()  # before onnxruntime copies the weights, twice
    session = ort.InferenceSession(unpacked, options, providers=list(providers))
    session._model_bytes = b""  # it would keep them in order to open itself again
    return session


def _unpacked(graph: _Graph, folder: Path, num_threads: int) -> bytes:
    """Return the ModelProto of a graph whose pieces have run."""
    pieces = graph.pieces()
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        made = pool.map(lambda piece: _run(graph, piece, folder), pieces)
        tensors = [tensor for found in made for tensor in found]
    done = {id(node) for piece in pieces for node in piece.nodes}
    nodes = [node for node in graph.nodes if id(node) not in done]
    return graph.bytes_of(nodes, [*(part.whole for part in graph.rest), *tensors])


def _run(graph: _Graph, piece: _Piece, folder: Path) -> list[Part]:
    """Return fields of the step graph: initializers with the piece's outputs."""
    names = [text(onnx.VALUE_NAME, name) for name in piece.outputs]
    outputs = [part for name in names for part in holding(onnx.OUTPUT, [name])]
    data = graph.bytes_of(piece.nodes, [text(onnx.NAME, "unpack"), *outputs])
    session = ort.InferenceSession(data, _plain(folder), providers=["CPUExecutionProvider"])
    values = session.run_with_ort_values(piece.outputs, {})
    fields: list[Part] = []
    for name, value in zip(piece.outputs, values, strict=True):
        fields += _initializer(name, value)
    return fields


def _plain(folder: Path) -> ort.SessionOptions:
    """Return options for a graph that runs once: every array is freed as soon as it is read."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.log_severity_level = 3
    options.add_session_config_entry(FOLDER, str(folder))
    return options


def _initializer(name: str, value: Any) -> list[Part]:
    return holding(onnx.INITIALIZER, onnx.tensor(name, value.numpy(), value.element_type()))


def _fields(key: int, messages: Sequence[bytes]) -> Iterator[Field]:
    for message in messages:
        yield from fields_of(memoryview(b"".join(holding(key, [message]))))


def _node(found: Field) -> _Node:
    return _Node(
        found.whole,
        onnx.texts_of(found.value, onnx.INPUTS),
        onnx.texts_of(found.value, onnx.OUTPUTS),
        tuple(onnx.read_within(found.value)),
    )
