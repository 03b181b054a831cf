"""Sight as nodes: where a step's rows stand and what they see, made once for all layers.

Rotary tables are of canvas positions; the mask joins what is cached before the window with the
window itself. Columns of the cache from the window's start on are padding.

Shapes: B rows, W window, P columns of the cache, hd head size.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from d2f_export.onnx.graph_builder import GraphBuilder, Value
from d2f_runtime.kernels.sampling import FORBIDDEN
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.rope_scaling import YarnRope
from d2f_runtime.models.rotary import attention_factor, rotary_frequencies

__all__ = ["Sight", "add_sight"]

LOWEST: Final = {"float32": FORBIDDEN, "float16": -65504.0}  # finite: no row's softmax is empty
NOWHERE: Final = 1 << 40  # a canvas position that nobody sees


@dataclass(frozen=True, slots=True)
class Sight:
    """What all layers share: where the rows stand and what they see.

    Attributes:
        cos, sin: [B, W, hd / 2].
        mask: [B, 1, W, P + W], added to the scores.
        query_scale: [B, W, 1], by which queries are multiplied; None leaves them.
    """

    cos: Value
    sin: Value
    mask: Value
    query_scale: Value | None = None


def add_sight(
    graph: GraphBuilder, config: TransformerConfig, dtype: str, *, window: object, past: object
) -> Sight:
    """Return the sight of the rows that the graph's inputs tell of.

    Args:
        graph: has the inputs tokens, start, visible_until and past.0.k.
        config: of the model.
        dtype: of its activations.
        window: W, a number where it is fixed.
        past: P, the same.
    """
    start = graph.op("Unsqueeze", "start", graph.constant([1]))  # [B, 1]
    ahead = _counting(graph, "tokens", window)
    positions = graph.op("Add", start, ahead)  # [B, W]
    frequency = graph.constant(rotary_frequencies(config).numpy(), "float32")
    angle = graph.op("Unsqueeze", positions, graph.constant([2]))
    angle = graph.op("Mul", graph.op("Cast", angle, to=1), frequency)
    tables = [graph.op(kind, angle) for kind in ("Cos", "Sin")]
    if (factor := attention_factor(config.rope_scaling)) != 1.0:
        tables = [graph.op("Mul", t, graph.constant(factor, "float32")) for t in tables]
    cos, sin = (_float(graph, table, dtype) for table in tables)
    cached = _counting(graph, "past.0.k", past)
    holds = graph.op("Less", cached, start)  # [B, P]
    cached = graph.op("Where", holds, cached, graph.constant(NOWHERE))
    columns = graph.op("Concat", cached, positions, axis=1)
    until = graph.op("Unsqueeze", "visible_until", graph.constant([2]))
    sees = graph.op("Less", graph.op("Unsqueeze", columns, graph.constant([1])), until)
    zero, lowest = graph.constant(0.0, dtype), graph.constant(LOWEST[dtype], dtype)
    mask = graph.op("Where", sees, zero, lowest)
    mask = graph.op("Unsqueeze", mask, graph.constant([1]))
    return Sight(cos, sin, mask, _query_scale(graph, config, dtype, positions))


def _query_scale(
    graph: GraphBuilder, config: TransformerConfig, dtype: str, positions: Value
) -> Value | None:
    """Return [B, W, 1] what queries are multiplied by; None leaves them."""
    scaling = config.rope_scaling
    if not isinstance(scaling, YarnRope) or not scaling.query_beta:
        return None
    one = graph.constant(1.0, "float32")
    turns = graph.op("Div", positions, graph.constant(scaling.trained_len))  # rounds down
    logarithm = graph.op("Log", graph.op("Add", graph.op("Cast", turns, to=1), one))
    scale = graph.op("Mul", logarithm, graph.constant(scaling.query_beta, "float32"))
    scale = _float(graph, graph.op("Add", scale, one), dtype)
    return graph.op("Unsqueeze", scale, graph.constant([2]))


def _counting(graph: GraphBuilder, tensor: Value, size: object) -> Value:
    """Return [1, size] the integers below the size of a tensor's second dimension."""
    if isinstance(size, int):
        return graph.constant(np.arange(size)[None])
    length = graph.op("Shape", tensor, start=1, end=2)
    length = graph.op("Squeeze", length, graph.constant([0]))
    counting = graph.op("Range", graph.constant(0), length, graph.constant(1))
    return graph.op("Unsqueeze", counting, graph.constant([0]))


def _float(graph: GraphBuilder, x: Value, dtype: str) -> Value:
    return x if dtype == "float32" else graph.op("Cast", x, to=10)
