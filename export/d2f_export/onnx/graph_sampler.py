"""From logits to proposals as nodes: the functions of `models.sampling`, which see.

Shapes: B rows, R predicted positions, V vocabulary.
"""

from typing import Any

from d2f_export.onnx.graph_builder import GraphBuilder, Value

__all__ = ["add_sampler"]


def add_sampler(
    graph: GraphBuilder,
    logits: Value,
    doubt: Value,
    *,
    are_finite: bool,
    temperature: Value,
    uniforms: Value,
    in_full: Value,
) -> Value:
    """Return [4, B, R] fp32 token, confidence, margin, neg_entropy.

    The cumulative sum, margins and entropies are made only where `in_full` asks for them.

    Args:
        graph: that grows.
        logits: [B, R, V] fp32, forbidden ids at FORBIDDEN.
        doubt: [B, R, 1] fp32, added to the confidence: 0 or NaN.
        are_finite: whether logits are finite numbers wherever `doubt` is 0.
        temperature: [B] fp32.
        uniforms: [B, R] fp32.
        in_full: [] bool.
    """
    branches: dict[str, Any] = {}
    if not are_finite:
        doubt = _doubt(graph, logits, doubt)
    with graph.branch("then_branch", branches):
        _propose(graph, logits, doubt, temperature, uniforms)
    with graph.branch("else_branch", branches):
        _best(graph, logits, doubt)
    return graph.op("If", in_full, **branches)


def _best(graph: GraphBuilder, logits: Value, doubt: Value) -> Value:
    token = graph.op("ArgMax", logits, axis=-1, keepdims=0)
    probabilities = graph.op("Softmax", logits, axis=-1)
    confidence = graph.op("ReduceMax", probabilities, graph.constant([-1]), keepdims=1)
    confidence = _squeezed(graph, graph.op("Add", confidence, doubt))
    return _stacked(graph, token, confidence, confidence, confidence)


def _propose(
    graph: GraphBuilder, logits: Value, doubt: Value, temperature: Value, uniforms: Value
) -> Value:
    zero, last = graph.constant(0.0, "float32"), graph.constant([-1])
    samples = graph.op("Unsqueeze", graph.op("Greater", temperature, zero), graph.constant([1]))
    divisor = graph.op("Where", samples, *_unsqueezed(graph, temperature), _one(graph))  # [B, 1]
    logits = graph.op("Div", logits, graph.op("Unsqueeze", divisor, last))
    highest, tokens = graph.ops("TopK", 2, logits, graph.constant([2]), axis=-1)
    best, second = graph.ops("Split", 2, highest, axis=-1, num_outputs=2)
    token, _ = graph.ops("Split", 2, tokens, axis=-1, num_outputs=2)
    below = graph.op("Sub", logits, best)
    weights = graph.op("Exp", below)
    total = _sum(graph, weights)  # [B, R, 1]
    confidence = graph.op("Add", _inverse(graph, total), doubt)
    margin = graph.op("Exp", graph.op("Sub", second, best))
    margin = graph.op("Mul", graph.op("Sub", _one(graph), margin), confidence)
    entropy = graph.op("Mul", _sum(graph, graph.op("Mul", weights, below)), confidence)
    entropy = graph.op("Sub", entropy, graph.op("Log", total))

    threshold = graph.op("Mul", graph.op("Unsqueeze", uniforms, last), total)
    passed = graph.op("CumSum", weights, graph.constant(-1))
    passed = graph.op("Cast", graph.op("LessOrEqual", passed, threshold), to=7)
    drawn = _sum(graph, passed)
    # rounding can leave the whole sum at or below the threshold
    size = graph.op("Shape", weights, start=2)
    drawn = graph.op("Where", graph.op("Less", drawn, size), drawn, token)
    weight = graph.op("GatherElements", weights, drawn, axis=-1)
    samples = graph.op("Unsqueeze", samples, last)
    token = graph.op("Where", samples, drawn, token)
    probability = graph.op("Mul", weight, confidence)
    confidence = graph.op("Where", samples, probability, confidence)
    parts = (_squeezed(graph, part) for part in (token, confidence, margin, entropy))
    return _stacked(graph, *parts)


def _doubt(graph: GraphBuilder, logits: Value, doubt: Value) -> Value:
    """Return [B, R, 1] `doubt`, NaN too where a logit is NaN or minus infinity."""
    lowest = graph.op("ReduceMin", logits, graph.constant([-1]), keepdims=1)
    return graph.op("Add", doubt, graph.op("Sub", lowest, lowest))


def _one(graph: GraphBuilder) -> Value:
    return graph.constant(1.0, "float32")


def _unsqueezed(graph: GraphBuilder, x: Value) -> tuple[Value]:
    return (graph.op("Unsqueeze", x, graph.constant([1])),)


def _squeezed(graph: GraphBuilder, x: Value) -> Value:
    return graph.op("Squeeze", x, graph.constant([-1]))


def _sum(graph: GraphBuilder, x: Value) -> Value:
    return graph.op("ReduceSum", x, graph.constant([-1]), keepdims=1)


def _inverse(graph: GraphBuilder, x: Value) -> Value:
    return graph.op("Div", _one(graph), x)


def _stacked(graph: GraphBuilder, token: Value, *others: Value) -> Value:
    parts = [graph.op("Cast", token, to=1), *others]
    first = graph.constant([0])
    return graph.op("Concat", *(graph.op("Unsqueeze", x, first) for x in parts), axis=0)
