"""One ONNX graph for a whole step: window and cache in, proposals and new K/V out.

The graph holds the attention mask, the logit shift, the forbidden ids and the sampler, so that
only small arrays cross its border: one output of proposals, one of new K/V. Rotary tables and mask
are made once per step, the sampler's cumulative sum only where something is sampled. What else was
tried: bench/onnx.

Shapes: B rows, W window, P columns of the cache, R predicted positions, H heads, KV key/value
heads, hd head size, D hidden size, V vocabulary.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2f_export.graph_layers import GraphLayer, LastGraphLayer
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.sampling import FORBIDDEN, best, propose, temper
from d2f_runtime.models.transformer import (
    KeyValue,
    Layer,
    Transformer,
    block_causal_mask,
    rotary_frequencies,
)

__all__ = ["OPSET", "StepGraph", "export_graph", "input_names", "output_names"]

OPSET = 23


class StepGraph(nn.Module):
    """What is exported; with copies of the joined weights, the others are the model's."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        config = model.config
        self.config = config
        self.embed_tokens = model.embed_tokens
        *layers, last = [layer for layer in model.layers if isinstance(layer, Layer)]
        self.layers = nn.ModuleList(GraphLayer(layer, config) for layer in layers)
        self.last_layer = LastGraphLayer(last, config)
        self.norm = model.norm
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        ids = torch.arange(config.vocab_size)
        forbidden = (ids == config.mask_id) | (ids >= config.num_tokens)
        self.head.bias = nn.Parameter(torch.where(forbidden, FORBIDDEN, 0.0))
        self.frequency: Tensor
        self.register_buffer("frequency", rotary_frequencies(config), persistent=False)

    def forward(
        self,
        tokens: Tensor,
        start: Tensor,
        visible_until: Tensor,
        head_rows: Tensor,
        in_full: Tensor,
        temperature: Tensor,
        uniforms: Tensor,
        past: list[KeyValue],
        last_hidden: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return the proposals, the states that made them, and the new K/V.

        The outputs are `proposals` [4, B, R] fp32 (token, confidence, margin, neg_entropy; ids
        below 2**24 are exact); with shifted logits `states` [B, R, D], the final states before each
        of `head_rows`; and `new` [2 L B, W, KV hd], keys and values layer by layer.

        Args:
            tokens: [B, W] int64.
            start: [B] int64, canvas position of the window; cache columns from there are padding.
            visible_until: [B, W] int64, one past the last canvas position that each row sees.
            head_rows: [B, R] int64, window positions to predict; up to W with shifted logits, whose
                state is that of the window's last position.
            in_full: [] bool. False is cheaper: no row samples, margin and neg_entropy repeat the
                confidence.
            temperature: [B] fp32.
            uniforms: [B, R] fp32 in [0, 1).
            past: per layer keys and values, [B, P, KV hd] each.
            last_hidden: [B, D] fp32, final state of position start - 1; with shifted logits.
        """
        mask = block_causal_mask(start, visible_until, past[0][0].shape[1])
        mask = torch.where(mask[:, 0], 0.0, FORBIDDEN)  # [B, W, P + W]
        rope = self._rope(start, tokens.shape[1])
        x = self.embed_tokens(tokens)
        new: list[Tensor] = []
        for layer, key_value in zip(self.layers, past[:-1], strict=True):
            x, key, value = layer(x, rope, mask, key_value)
            new += [key, value]
        # With shifted logits, position i is predicted by row i of [last_hidden; hidden].
        rows = head_rows if last_hidden is None else (head_rows - 1).clamp(min=0)
        x, key, value = self.last_layer.select(x, rope, mask, past[-1], rows)
        hidden = self.norm(x)  # [B, R, D]
        if last_hidden is not None:
            hidden = torch.where(head_rows[:, :, None] == 0, last_hidden[:, None], hidden)
        new += [key, value]
        proposed = torch.cond(
            in_full, _propose_in_full, _propose_best, (self.head(hidden), temperature, uniforms)
        )
        states = () if last_hidden is None else (hidden,)
        return proposed, *states, torch.cat(new, dim=0)

    def _rope(self, start: Tensor, window: int) -> KeyValue:
        """Return cos and sin, [B, W, hd / 2] each."""
        positions = start[:, None] + torch.arange(window)
        angle = positions[:, :, None].float() * self.frequency
        return angle.cos(), angle.sin()


def input_names(config: TransformerConfig) -> list[str]:
    """Return the graph's inputs in order."""
    shifted = ["last_hidden"] if config.shift_logits else []
    names = ["tokens", "start", "visible_until", "head_rows", "in_full", "temperature", "uniforms"]
    return names + [f"past.{i}.{x}" for i in range(config.num_layers) for x in "kv"] + shifted


def output_names(config: TransformerConfig) -> list[str]:
    """Return the graph's outputs in order."""
    return ["proposals", *(["states"] if config.shift_logits else []), "new"]


def export_graph(model: Transformer, path: Path) -> None:
    """Write the model's step graph in fp32, with symbolic batch, window, past and rows."""
    config = model.config
    arguments, shapes = _example(config)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations; nothing that a caller can mend
        program = torch.onnx.export(
            StepGraph(model.float()).eval(),
            arguments,
            dynamo=True,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            input_names=input_names(config),
            output_names=output_names(config),
            report=False,
            verbose=False,
        )
    assert program is not None
    program.save(str(path), external_data=False)


def _example(config: TransformerConfig) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return example arguments and which of their dimensions are dynamic."""
    batch, window, past, rows = 2, 3, 5, 2
    size = torch.export.Dim
    b, w, p, r = size("batch"), size("window"), size("past"), size("rows")
    cache_shape = (batch, past, config.num_kv_heads * config.head_dim)
    arguments: list[Any] = [
        torch.zeros(batch, window, dtype=torch.long),
        torch.full((batch,), past),
        torch.full((batch, window), past + window),
        torch.zeros(batch, rows, dtype=torch.long),
        torch.tensor(False),
        torch.zeros(batch),
        torch.zeros(batch, rows),
        # NOTE: one tensor each: the exporter takes the same object for the same input.
        [(torch.zeros(cache_shape), torch.zeros(cache_shape)) for _ in range(config.num_layers)],
    ]
    kv = {0: b, 1: p}
    shapes: list[Any] = [
        {0: b, 1: w},
        {0: b},
        {0: b, 1: w},
        {0: b, 1: r},
        {},
        {0: b},
        {0: b, 1: r},
        [(kv, kv)] * config.num_layers,
    ]
    if config.shift_logits:
        arguments.append(torch.zeros(batch, config.hidden_size))
        shapes.append({0: b})
    return tuple(arguments), tuple(shapes)


def _propose_best(logits: Tensor, temperature: Tensor, uniforms: Tensor) -> Tensor:
    token, confidence = best(logits)
    return _stacked((token, confidence, confidence, confidence))


def _propose_in_full(logits: Tensor, temperature: Tensor, uniforms: Tensor) -> Tensor:
    per_row = temperature[:, None].expand_as(uniforms)
    return _stacked(propose(temper(logits, per_row), per_row, uniforms))


def _stacked(proposed: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([values.float() for values in proposed])
