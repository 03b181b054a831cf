"""The transformer's layers as nodes: the same functions as `models.transformer`, in few of them.

One product for queries, keys and values, heads kept flat, one Attention node. The last layer goes
on with the rows that somebody reads: its keys and values are stored for the whole window, but its
attention and feed-forward run for the states that predict a mask or are kept for the next step.

Shapes: B rows, W window, P columns of the cache, S selected rows, H heads, KV key/value heads, hd
head size, D hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from d2f_export.onnx.graph_builder import (
    MICROSOFT,
    Array,
    GraphBuilder,
    Stored,
    Value,
    Weights,
)
from d2f_export.onnx.graph_mixture import add_mixture
from d2f_export.onnx.graph_sight import Sight
from d2f_export.onnx.quantize import Linear
from d2f_export.onnx.smoothing import DOWN, NORMS
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.draft_adapter import PARENTS, product_shapes

__all__ = ["Draft", "add_layer", "norm", "select_rows"]


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft adapter's part in the layers.

    Attributes:
        rows: [B, W, 1], 1 for the rows that go through it and 0 for the others.
        ranks: of the factors by the parameter's name, such as "layers.0.mlp.up_proj".
    """

    rows: Value
    ranks: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Layer:
    graph: GraphBuilder
    linear: Linear
    config: TransformerConfig
    index: int
    draft: Draft | None = None

    def path(self, name: str) -> str:
        return f"layers.{self.index}.{name}"

    def norm(self, x: Value, name: str) -> Value:
        smooth = self.smooth(name)
        return norm(self.graph, x, self.path(name), self.config, self.linear.dtype, smooth=smooth)

    def norm_of_sum(self, x: Value, added: Value, name: str) -> tuple[Value, Value]:
        """Return the normalised sum, and the sum."""
        if not self.linear.in_bytes:
            x = self.graph.op("Add", x, added)
            return self.norm(x, name), x
        scale = norm_scale(
            self.graph, self.path(name), self.config, self.linear.dtype, self.smooth(name)
        )
        kind, epsilon = "SkipSimplifiedLayerNormalization", self.config.norm_eps
        inputs = x, added, scale
        normed, _, _, total = self.graph.ops(kind, 4, *inputs, domain=MICROSOFT, epsilon=epsilon)
        return normed, total

    def smooth(self, name: str) -> str | None:
        """Return the name of the factors that channels are divided by, of a norm or before DOWN."""
        can_be = name in NORMS or name == DOWN
        smooths = self.linear.smooths and can_be and self.config.mixture is None
        return f"smooth.{self.path(name)}" if smooths else None

    def product(self, x: Value, joined: str, parts: Sequence[str], *, after: str = "") -> Value:
        """Multiply with the joined matrices of some products; draft rows with their factors too.

        Args:
            x: the activations.
            joined: name of the joined matrix.
            parts: the products, such as "gate".
            after: the norm that returned the activations, or DOWN.
        """
        smooth = self.smooth(after)
        twice = after == DOWN and self.index == 0
        names = [self.path(f"{PARENTS[f'{part}_proj']}.{part}_proj") for part in parts]
        shapes = [product_shapes(self.config)[f"{part}_proj"] for part in parts]
        sizes = [num_out for num_out, _ in shapes]
        num_in = shapes[0][1]
        divided = "divided." if "up" in parts and self.smooth(DOWN) is not None else ""
        prefixes = [divided if part == "up" else "" for part in parts]
        weights = [f"{prefix}{name}.weight" for prefix, name in zip(prefixes, names, strict=True)]
        draft = self.draft
        if draft is None or not any(name in draft.ranks for name in names):
            shape = (sum(sizes), num_in)
            return self.linear(x, self.path(joined), weights, shape, smooth=smooth, twice=twice)
        ranks = [draft.ranks.get(name, 0) for name in names]
        downs = [f"draft.{n}.down" for n, rank in zip(names, ranks, strict=True) if rank]
        shape = (sum(sizes) + sum(ranks), num_in)
        sources = [*weights, *downs]
        both = self.linear(x, self.path(joined), sources, shape, smooth=smooth, twice=twice)
        parts_of = self.graph.constant([sum(sizes), sum(ranks)])
        out, narrow = self.graph.ops("Split", 2, both, parts_of, axis=2)
        ups = [f"{prefix}draft.{name}.up" for prefix, name in zip(prefixes, names, strict=True)]
        factors = list(zip(sizes, ranks, strict=True))
        return self.graph.op("Add", out, self.linear.by_parts(narrow, ups, factors, draft.rows))

    def project(self, x: Value, joined: str, parts: str, num_out: int) -> Value:
        """Multiply with the joined matrices of q, k and v, or some of them; add their biases."""
        names = [self.path(f"self_attn.{part}_proj") for part in parts]
        out = self.product(x, joined, parts, after="input_layernorm")
        if not self.config.qkv_bias:
            return out
        dtype = self.linear.dtype
        stored = Stored(self.path(f"{joined}.bias"), dtype, (num_out,))
        sources = tuple(f"{name}.bias" for name in names)
        weights = Weights(sources, (stored,), lambda *biases: [_joined(biases, dtype)])
        return self.graph.op("Add", out, *self.graph.store(weights))

    def rotate(self, x: Value, part: str, num_heads: int, sight: Sight) -> Value:
        """Normalise each head where the family does, then rotate [B, W, heads hd]."""
        graph, size = self.graph, self.config.head_dim
        if self.config.qk_norm:
            x = graph.op("Reshape", x, graph.constant([0, 0, num_heads, size]))
            x = self.norm(x, f"self_attn.{part}_norm")
            x = graph.op("Reshape", x, graph.constant([0, 0, num_heads * size]))
        return graph.op("RotaryEmbedding", x, sight.cos, sight.sin, num_heads=num_heads)

    def feed_forward(self, x: Value, added: Value) -> tuple[Value, Value]:
        """Return the sum [B, W, D] of the two, and what the feed-forward adds to it."""
        graph = self.graph
        normed, x = self.norm_of_sum(x, added, "post_attention_layernorm")
        mixture = self.config.mixture
        if mixture is not None and not mixture.is_dense(self.index):
            return x, add_mixture(self.linear, self.config, self.path("mlp"), normed)
        after = "post_attention_layernorm"
        both = self.product(normed, "mlp.gate_up_proj", ["gate", "up"], after=after)
        gate, up = graph.ops("Split", 2, both, axis=2, num_outputs=2)
        gate = graph.op("Mul", gate, graph.op("Sigmoid", gate))
        return x, self.product(graph.op("Mul", gate, up), DOWN, ["down"], after=DOWN)


def add_layer(
    linear: Linear,
    config: TransformerConfig,
    index: int,
    x: Value,
    sight: Sight,
    past: tuple[Value, Value],
    *,
    added: Value | None = None,
    rows: Value | None = None,
    draft: Draft | None = None,
) -> tuple[Value, Value, Value, Value]:
    """Return the residual stream in two addends, and the window's keys and values.

    Args:
        linear: of the graph.
        config: of the model.
        index: of the layer.
        x: [B, W, D].
        sight: of the rows.
        past: keys and values, [B, P, KV hd] each.
        added: [B, W, D], what the layer before adds to `x`.
        rows: [B, S] window positions to go on with; None is all.
        draft: the adapter for draft rows.

    Returns:
        [B, W or S, D] twice, and keys and values [B, W, KV hd] each.
    """
    graph, layer = linear.graph, _Layer(linear.graph, linear, config, index, draft)
    query_size = config.num_heads * config.head_dim
    key_size = config.num_kv_heads * config.head_dim
    name = "input_layernorm"
    if added is None:
        normed = layer.norm(x, name)
    else:
        normed, x = layer.norm_of_sum(x, added, name)
    if rows is None:
        size = query_size + 2 * key_size
        joined = layer.project(normed, "self_attn.qkv_proj", "qkv", size)
        sizes = graph.constant([query_size, key_size, key_size])
        query, key, value = graph.ops("Split", 3, joined, sizes, axis=2)
    else:
        joined = layer.project(normed, "self_attn.kv_proj", "kv", 2 * key_size)
        sizes = graph.constant([key_size, key_size])
        key, value = graph.ops("Split", 2, joined, sizes, axis=2)
    key = layer.rotate(key, "k", config.num_kv_heads, sight)
    seen = sight
    if rows is not None:
        x, normed = (select_rows(graph, states, rows) for states in (x, normed))
        seen = _selected(graph, sight, rows)
        if draft is not None:
            layer = replace(layer, draft=Draft(select_rows(graph, draft.rows, rows), draft.ranks))
        query = layer.project(normed, "self_attn.q_proj", "q", query_size)
    query = layer.rotate(query, "q", config.num_heads, seen)
    if seen.query_scale is not None:
        query = graph.op("Mul", query, seen.query_scale)
    keys = graph.op("Concat", past[0], key, axis=1)
    values = graph.op("Concat", past[1], value, axis=1)
    heads, key_heads = config.num_heads, config.num_kv_heads
    inputs = query, keys, values, seen.mask
    out = graph.op("Attention", *inputs, q_num_heads=heads, kv_num_heads=key_heads)
    out = layer.product(out, "self_attn.o_proj", ["o"])
    return *layer.feed_forward(x, out), key, value


def _selected(graph: GraphBuilder, sight: Sight, rows: Value) -> Sight:
    mask = graph.op("Squeeze", sight.mask, graph.constant([1]))
    mask = graph.op("Unsqueeze", select_rows(graph, mask, rows), graph.constant([1]))
    cos, sin = (select_rows(graph, table, rows) for table in (sight.cos, sight.sin))
    scale = sight.query_scale
    return Sight(cos, sin, mask, None if scale is None else select_rows(graph, scale, rows))


def norm(
    graph: GraphBuilder,
    x: Value,
    name: str,
    config: TransformerConfig,
    dtype: str,
    *,
    smooth: str | None = None,
) -> Value:
    """Normalise the last dimension by its root mean square, in fp32.

    `smooth` names factors that the channels are divided by.
    """
    scale = norm_scale(graph, name, config, dtype, smooth)
    return graph.op("RMSNormalization", x, scale, axis=-1, epsilon=config.norm_eps, stash_type=1)


def norm_scale(
    graph: GraphBuilder, name: str, config: TransformerConfig, dtype: str, smooth: str | None
) -> Value:
    """Return the weights of a norm, divided by the factors that `smooth` names."""
    size = config.head_dim if name.endswith(("q_norm", "k_norm")) else config.hidden_size
    stored = Stored(f"{name}.weight", dtype, (size,))
    weights = Weights((stored.name,), (stored,), lambda *w: [_joined(w, dtype)])
    if smooth is not None:
        weights = Weights(
            (stored.name, smooth), (stored,), lambda w, by: [_joined([w.float() / by], dtype)]
        )
    (scale,) = graph.store(weights)
    return scale


def select_rows(graph: GraphBuilder, states: Value, rows: Value) -> Value:
    """Select [B, S] rows of [B, W, ...]."""
    index = graph.op("Unsqueeze", rows, graph.constant([2]))
    return graph.op("GatherND", states, index, batch_dims=1)


def _joined(vectors: Sequence[Tensor], dtype: str) -> Array:
    return np.concatenate([vector.float().numpy() for vector in vectors]).astype(dtype)
