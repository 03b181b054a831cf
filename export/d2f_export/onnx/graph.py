"""One ONNX graph for a whole step: window and cache in, proposals and new K/V out.

The graph holds the attention mask, the logit shift, the forbidden ids and the sampler, so that
only small arrays cross its border. New K/V leave it layer by layer, so that a backend lets them be
written where they will be cached. Rotary tables and mask are made once per step, the sampler's
cumulative sum only where something is sampled. What else was tried: bench/onnx.

Inputs, in order:
    tokens: [B, W] int64.
    start: [B] int64, canvas position of the window; cache columns from there are padding.
    visible_until: [B, W] int64, one past the last canvas position that each row sees.
    head_rows: [B, R] int64, window positions to predict; up to W with shifted logits, whose state
        is that of the window's last position.
    in_full: [] bool. False is cheaper: no row samples, margin and neg_entropy repeat the
        confidence.
    temperature: [B] fp32.
    uniforms: [B, R] fp32 in [0, 1).
    past.{i}.k, past.{i}.v: per layer keys and values, [B, P, KV hd] each.
    With a draft adapter, is_draft: [B, W] bool, the rows that go through it.
    With shifted logits, last_hidden: [B, D], final state of position start - 1; and keep: [B]
        int64, which of `head_rows` has the state to be kept.

Outputs:
    proposals: [4, B, R] fp32 token, confidence, margin, neg_entropy; ids below 2**24 are exact. The
        confidence is NaN where the window's states or the row's logits are no finite numbers.
    With shifted logits, kept: [B, D], the state that predicts that position.
    new.{i}.k, new.{i}.v: the window's keys and values, [B, W, KV hd] each.
    logits: [B, R, V] fp32 before temperature; for comparisons, costs nothing where not asked for.

Shapes: B rows, W window, P columns of the cache, R predicted positions, KV key/value heads, hd head
size, D hidden size, V vocabulary. Floats are fp32 unless the weights are in fp16.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import helper

from d2f_export.onnx.graph_builder import GraphBuilder, Stored, Value, Weights
from d2f_export.onnx.graph_layers import Draft, add_layer, norm
from d2f_export.onnx.graph_sampler import add_sampler
from d2f_export.onnx.graph_sight import add_sight
from d2f_export.onnx.quantize import QUANTIZATIONS, Linear, Quantization
from d2f_export.onnx.smoothing import FINAL
from d2f_runtime.kernels.sampling import FORBIDDEN
from d2f_runtime.models.config import TransformerConfig
from d2f_stream.core.errors import UnsupportedModel

__all__ = ["FixedShape", "StepGraph", "step_graph"]


@dataclass(frozen=True, slots=True)
class FixedShape:
    """The shape of a graph without symbols: one row of `window` positions, all predicted.

    Attributes:
        window: positions.
        capacity: columns of the cache.
    """

    window: int
    capacity: int


@dataclass(frozen=True, slots=True)
class StepGraph:
    """A graph, and the weights that its ModelProto declares without their data, in order."""

    model: Any
    weights: list[Weights]


def step_graph(
    config: TransformerConfig,
    quantization: Quantization,
    *,
    fixed: FixedShape | None = None,
    draft_ranks: Mapping[str, int] | None = None,
) -> StepGraph:
    """Return the graph of a model's step.

    Args:
        config: of the model.
        quantization: of its matrices.
        fixed: static shapes; None is symbolic batch, window, past and rows.
        draft_ranks: of a draft adapter's factors, see `Draft`; None is without one.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization is {quantization!r}, not one of {QUANTIZATIONS}")
    if fixed is not None and config.mixture is not None:
        raise UnsupportedModel(
            "a mixture of experts sends other numbers of rows to each expert in each step, which a "
            "graph of static shapes cannot hold; export it with --target cpu or cuda"
        )
    step = _Step(config, quantization, fixed, draft_ranks)
    step.build()
    return StepGraph(step.graph.model(step.inputs, step.outputs), step.graph.weights)


class _Step:
    def __init__(
        self,
        config: TransformerConfig,
        quantization: Quantization,
        fixed: FixedShape | None,
        draft_ranks: Mapping[str, int] | None,
    ) -> None:
        self.config, self.fixed, self.draft_ranks = config, fixed, draft_ranks
        self.graph = GraphBuilder()
        self.linear = Linear(self.graph, quantization)
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        sizes: tuple[object, ...] = ("batch", "window", "past", "rows")
        if fixed is not None:
            sizes = (1, fixed.window, fixed.capacity, fixed.window)
        self.batch, self.window, self.past, self.rows = sizes

    def build(self) -> None:
        config, graph = self.config, self.graph
        for name, dtype, shape in self._declared_inputs():
            self.inputs.append(_info(name, dtype, shape))
        x, draft = self._embedded(), self._draft()
        sight = add_sight(graph, config, self.linear.dtype, window=self.window, past=self.past)
        head_rows = "head_rows"
        if config.shift_logits:
            # Position i is predicted by row i of [last_hidden; hidden].
            before = graph.op("Sub", head_rows, graph.constant(1))
            head_rows = graph.op("Max", before, graph.constant(0))
        new: list[tuple[Value, Value]] = []
        added: Value | None = None
        for index in range(config.num_layers):
            rows = None
            if index == config.num_layers - 1:
                rows = head_rows
                x, added = x if added is None else graph.op("Add", x, added), None
                doubt = self._doubt(x, [1, 2])  # integer products and a maximum pass over NaN
            past = f"past.{index}.k", f"past.{index}.v"
            x, added, key, value = add_layer(
                self.linear, config, index, x, sight, past, added=added, rows=rows, draft=draft
            )
            new.append((key, value))
        assert added is not None
        self._predict(graph.op("Add", x, added), doubt)
        self._name_new(new)

    def _declared_inputs(self) -> list[tuple[str, str, list[object]]]:
        config, dtype = self.config, self.linear.dtype
        batch, window, rows = self.batch, self.window, self.rows
        cache = [batch, self.past, config.num_kv_heads * config.head_dim]
        declared: list[tuple[str, str, list[object]]] = [
            ("tokens", "int64", [batch, window]),
            ("start", "int64", [batch]),
            ("visible_until", "int64", [batch, window]),
            ("head_rows", "int64", [batch, rows]),
            ("in_full", "bool", []),
            ("temperature", "float32", [batch]),
            ("uniforms", "float32", [batch, rows]),
        ]
        layers = range(config.num_layers)
        declared += [(f"past.{i}.{part}", dtype, cache) for i in layers for part in "kv"]
        if self.draft_ranks is not None:
            declared.append(("is_draft", "bool", [batch, window]))
        if self.config.shift_logits:
            declared.append(("last_hidden", dtype, [batch, config.hidden_size]))
            declared.append(("keep", "int64", [batch]))
        return declared

    def _embedded(self) -> Value:
        """Return [B, W, D] what the tokens are to the first layer."""
        graph, config = self.graph, self.config
        if self.draft_ranks is None:
            return self._looked_up("tokens")
        stored = Stored("mask_embedding", self.linear.dtype, (config.hidden_size,))
        weights = Weights(
            ("draft.mask_embedding",), (stored,), lambda w: [w.float().numpy().astype(stored.dtype)]
        )
        (mask,) = graph.store(weights)
        is_mask = graph.op("Equal", "tokens", graph.constant(config.mask_id))
        known = graph.op("Where", is_mask, graph.constant(0), "tokens")  # the table may lack it
        known = self._looked_up(known)
        return graph.op("Where", graph.op("Unsqueeze", is_mask, graph.constant([2])), mask, known)

    def _draft(self) -> Draft | None:
        if self.draft_ranks is None:
            return None
        to = helper.np_dtype_to_tensor_dtype(np.dtype(self.linear.dtype))
        rows = self.graph.op("Cast", "is_draft", to=to)
        rows = self.graph.op("Unsqueeze", rows, self.graph.constant([2]))
        return Draft(rows, self.draft_ranks)

    def _looked_up(self, tokens: Value) -> Value:
        shape = (self.config.vocab_size, self.config.hidden_size)
        return self.linear.look_up(tokens, "embed_tokens.weight", shape)

    def _predict(self, x: Value, doubt: Value) -> None:
        """Add final norm, shift, head and sampler; name what leaves the graph.

        Args:
            x: [B, R, D] states.
            doubt: [B, 1, 1] of the whole window.
        """
        config, graph, dtype = self.config, self.graph, self.linear.dtype
        smooth = f"smooth.{FINAL}" if self.linear.smooths and config.mixture is None else None
        hidden = norm(graph, x, FINAL, config, dtype, smooth=smooth)  # [B, R, D]
        if config.shift_logits:
            is_first = graph.op("Equal", "head_rows", graph.constant(0))
            is_first = graph.op("Unsqueeze", is_first, graph.constant([2]))
            last = graph.op("Unsqueeze", "last_hidden", graph.constant([1]))
            hidden = graph.op("Where", is_first, last, hidden)
            keep = graph.op("Unsqueeze", "keep", graph.constant([1]))
            kept = graph.op("GatherND", hidden, keep, batch_dims=1)
            graph.rename(kept, "kept")
        tied = "embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
        shape = (config.vocab_size, config.hidden_size)
        doubt = graph.op("Add", doubt, self._doubt(hidden, [2]))  # [B, R, 1]
        inputs = hidden, "lm_head.weight", [tied], shape
        logits = self.linear(*inputs, exact=True, smooth=smooth)
        logits = graph.op("Cast", logits, to=1) if dtype != "float32" else logits
        lowest = graph.constant(FORBIDDEN, "float32")
        logits = graph.op("Where", self._forbidden(), lowest, logits)
        graph.rename(logits, "logits")
        proposals = add_sampler(
            graph,
            "logits",
            doubt,
            are_finite=self.linear.in_bytes,
            temperature="temperature",
            uniforms="uniforms",
            in_full="in_full",
        )
        graph.rename(proposals, "proposals")
        self.outputs.append(_info("proposals", "float32", [4, self.batch, self.rows]))
        if config.shift_logits:
            self.outputs.append(_info("kept", dtype, [self.batch, config.hidden_size]))

    def _name_new(self, new: list[tuple[Value, Value]]) -> None:
        config, graph, dtype = self.config, self.graph, self.linear.dtype
        shape = [self.batch, self.window, config.num_kv_heads * config.head_dim]
        for index, pair in enumerate(new):
            for part, value in zip("kv", pair, strict=True):
                name = f"new.{index}.{part}"
                graph.rename(value, name)
                self.outputs.append(_info(name, dtype, shape))
        rows = [self.batch, self.rows, config.vocab_size]
        self.outputs.append(_info("logits", "float32", rows))

    def _forbidden(self) -> Value:
        """Return [V] bool, the ids that must never be produced."""
        config = self.config
        ids = np.arange(config.vocab_size)
        forbidden = np.isin(ids, config.forbidden_ids) | (ids >= config.num_tokens)
        return self.graph.constant(forbidden, "bool")

    def _doubt(self, x: Value, axes: list[int]) -> Value:
        """Return fp32 zeros, NaN where something along the axes is no finite number."""
        graph = self.graph
        nothing = graph.op("Mul", x, graph.constant(0.0, self.linear.dtype))
        doubt = graph.op("ReduceSum", nothing, graph.constant(axes), keepdims=1)
        return graph.op("Cast", doubt, to=1) if self.linear.dtype != "float32" else doubt


def _info(name: str, dtype: str, shape: list[object]) -> Any:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return helper.make_tensor_value_info(name, kind, shape)
