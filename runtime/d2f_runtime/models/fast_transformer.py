"""The transformer of the fast step: merged projections, K/V written in place, one op per stage.

The same model as `transformer.Transformer`, cut differently: rows of all sessions stand one after
the other without padding between them, attention reads the pool where it lies, and sums of
residuals are joined with the norms that follow them. Runs with kernels on a GPU and with their
references anywhere.

Shapes: M rows of all sessions, D hidden size, V vocabulary, H heads, KV key/value heads, hd head
size, L layers, T pool places.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from d2f_runtime.kernels import (
    attention,
    drafted,
    experts,
    fetch,
    gate,
    head,
    norm,
    rope,
    routing,
)
from d2f_runtime.kernels.activation import Activation, quantise, quantise_rows
from d2f_runtime.kernels.sampling import FORBIDDEN, ids_on
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.fast_draft import DraftRows, FastDraft, FastLayerDraft
from d2f_runtime.models.fast_layer import FastFeedForward, FastLayer, pack_layer
from d2f_runtime.models.fast_mixture import FastMixture
from d2f_runtime.models.rotary import query_scale, rotary
from d2f_runtime.models.transformer import Transformer
from d2f_runtime.quantization.linear import PackedLinear, pack, rotated

__all__ = ["KERNELS", "REFERENCES", "FastTransformer", "Ops", "StepTensors"]


@dataclass(frozen=True, slots=True)
class Ops:
    """The stages of a step beside the matrix products, as kernels or as their references."""

    residual_norm: Callable[..., tuple[Tensor, Activation]]
    rotate_and_store: Callable[..., Tensor]
    attend: Callable[..., Activation]
    silu_gate: Callable[..., Activation]
    quantise: Callable[[Tensor], Activation]
    best_tokens: Callable[..., Tensor]
    fetch: Callable[[Tensor, Tensor], None]
    drafted: Callable[..., Tensor]
    route: Callable[..., routing.Routes]
    through_experts: Callable[..., Tensor]


KERNELS = Ops(
    norm.residual_norm,
    rope.rotate_and_store,
    attention.attend,
    gate.silu_gate,
    quantise,
    head.best_tokens,
    fetch.fetch,
    drafted.drafted_product,
    routing.route,
    experts.through_experts,
)
REFERENCES = Ops(
    norm.residual_norm_reference,
    rope.rotate_and_store_reference,
    attention.attend_reference,
    gate.silu_gate_reference,
    quantise_rows,
    head.best_tokens_reference,
    fetch.fetch_reference,
    drafted.drafted_product_reference,
    routing.route_reference,
    experts.through_experts_reference,
)


class StepTensors(NamedTuple):
    """What a forward reads besides weights and pool; each int32 on the device.

    Attributes:
        tokens: [M].
        positions: [M] canvas positions.
        places: [M] pool places to write K/V to; negative for none.
        visible: [M] one past the last canvas position that each row sees; 0 for padding.
        tiles: [N, TILE_FIELDS], see `kernels.attention`.
        drafts: [M] 1 for rows that go through the draft adapter, else 0; unused without one.
    """

    tokens: Tensor
    positions: Tensor
    places: Tensor
    visible: Tensor
    tiles: Tensor
    drafts: Tensor | None = None


class FastTransformer:
    """Packed weights and the forward over them. The embedding stays in the model's dtype.

    Args:
        model: on its device and in its dtype.
        quantization: of the layers' products: "fp8" (the head's too), "nf4", "int8", or anything
            else for the model's dtype.
        ops: kernels or references.
        consume: free each layer of `model` once it is packed; the model is unusable after that.
        max_len: positions that occur; None is the model's, which may be many more than have room.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        quantization: str,
        ops: Ops,
        consume: bool = False,
        max_len: int | None = None,
    ) -> None:
        self.config = model.config
        self.ops = ops
        self._draft = model.draft
        with torch.no_grad():
            self._layers = [
                pack_layer(model.layers, index, quantization, consume, model.draft, model.config)
                for index in range(model.config.num_layers)
            ]
            self._embedding = model.embed_tokens.weight.detach()
            head = model.lm_head.weight.detach()
            in_fp8 = quantization == "fp8" and head.shape[0] % 16 == 0  # the library's demand
            self._head = pack(head, "fp8" if in_fp8 else "none", head.dtype)
            self._norm = model.norm.weight.detach()
            unnamed = model.config.unnamed_ids
            self._unnamed = ids_on(unnamed, head.device) if unnamed else None
            self._table = _rope_table(
                model.config, max_len or model.config.max_len, self._embedding.device
            )

    @property
    def num_bytes(self) -> int:
        """What a step reads of the weights, embedding rows aside."""
        held: list[PackedLinear | FastMixture] = [self._head]
        for layer in self._layers:
            held += [layer.qkv, layer.out]
            inner = layer.feed_forward
            held += [inner] if isinstance(inner, FastMixture) else [inner.gate_up, inner.down]
        return sum(weights.num_bytes for weights in held)

    @property
    def weight_bytes(self) -> int:
        """Memory that the weights take, embedding included, norms and biases aside."""
        embedding = self._embedding.numel() * self._embedding.element_size()
        is_shared = self.config.tie_embeddings and not self._head.takes_fp8
        return self.num_bytes + (0 if is_shared else embedding)

    def forward(self, step: StepTensors, store: Tensor) -> Tensor:
        """Return the final states [M, D]; write the K/V of all rows to their places.

        Args:
            step: the rows.
            store: [2 L, T, KV, hd] keys and values of the layers in turn.
        """
        ops, eps = self.ops, self.config.norm_eps
        x, drafts = self._embedded(step)
        scale = query_scale(step.positions, self.config.rope_scaling)
        parts: Tensor | None = None
        for index, layer in enumerate(self._layers):
            keys, values = store[2 * index], store[2 * index + 1]
            x, rows = ops.residual_norm(
                x, parts, layer.input_norm, eps, quantise=layer.qkv.takes_fp8
            )
            query = self._rotated(
                layer,
                rows,
                rope.Rotation(
                    keys,
                    values,
                    positions=step.positions,
                    places=step.places,
                    table=self._table,
                    bias=layer.qkv_bias,
                    norms=layer.head_norms,
                ),
                drafts,
            )
            if scale is not None:
                query = query * scale[:, None, None].to(query.dtype)
            attended = ops.attend(
                query,
                keys,
                values,
                visible=step.visible,
                tiles=step.tiles,
                quantise=layer.out.takes_fp8,
                positions=step.positions,
            )
            parts = _parts(layer.out, attended, layer.draft.out if layer.draft else None, drafts)
            inner = layer.feed_forward
            if isinstance(inner, FastMixture):
                x, rows = ops.residual_norm(x, parts, layer.ffn_norm, eps)
                parts = inner.parts(
                    rows.values,
                    step.visible,
                    route=ops.route,
                    through_experts=ops.through_experts,
                )
                continue
            x, rows = ops.residual_norm(
                x, parts, layer.ffn_norm, eps, quantise=inner.gate_up.takes_fp8
            )
            gated = self._gated(inner, layer.draft, rows, drafts)
            parts = _parts(inner.down, gated, layer.draft.down if layer.draft else None, drafts)
        _, rows = ops.residual_norm(x, parts, self._norm, eps)
        return rows.values

    def _embedded(self, step: StepTensors) -> tuple[Tensor, DraftRows | None]:
        """Return [M, D] what the tokens are to the layers, and which rows are drafts."""
        draft = self._draft
        if draft is None:
            return F.embedding(step.tokens, self._embedding), None
        assert step.drafts is not None
        is_mask = step.tokens == draft.mask_id
        known = F.embedding(step.tokens.masked_fill(is_mask, 0), self._embedding)
        x = torch.where(is_mask[:, None], draft.mask_embedding, known)
        return x, DraftRows(step.drafts, step.drafts[:, None].to(x.dtype), self.ops.drafted)

    def _rotated(
        self,
        layer: FastLayer,
        rows: Activation,
        rotation: rope.Rotation,
        drafts: DraftRows | None,
    ) -> Tensor:
        """Return the queries [M, H, hd]; store keys and values."""
        if drafts is not None and layer.draft is not None and layer.draft.qkv is not None:
            qkv = layer.draft.qkv.multiplied(layer.qkv, rows, drafts)
            return self.ops.rotate_and_store(qkv, rotation)
        query = rotated(layer.qkv, rows, rotation)
        return self.ops.rotate_and_store(layer.qkv(rows), rotation) if query is None else query

    def _gated(
        self,
        inner: FastFeedForward,
        draft: FastLayerDraft | None,
        rows: Activation,
        drafts: DraftRows | None,
    ) -> Activation:
        """Return what the down projection takes."""
        to_fp8 = inner.down.takes_fp8
        if drafts is not None and draft is not None and draft.gate_up is not None:
            gate_up = draft.gate_up.multiplied(inner.gate_up, rows, drafts)
            return self.ops.silu_gate(gate_up, quantise=to_fp8)
        gated = inner.gate_up.gated(rows)
        if gated is None:
            return self.ops.silu_gate(inner.gate_up(rows), quantise=to_fp8)
        return self.ops.quantise(gated) if to_fp8 else Activation(gated)

    def logits(self, states: Tensor) -> Tensor:
        """Return [N, V] raw logits of final states."""
        takes_fp8 = self._head.takes_fp8
        return self._head(self.ops.quantise(states) if takes_fp8 else Activation(states))

    def best_tokens(self, states: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return [4, N] fp32 token, confidence, margin and negative entropy of final states."""
        config, logits = self.config, self.logits(states)
        if self._unnamed is not None:
            logits.index_fill_(1, self._unnamed, max(FORBIDDEN, torch.finfo(logits.dtype).min))
        return self.ops.best_tokens(
            logits, mask_id=config.mask_id, num_tokens=config.num_tokens, out=out
        )


def _parts(
    linear: PackedLinear, x: Activation, draft: FastDraft | None, drafts: DraftRows | None
) -> Tensor:
    """Return [S, M, N], to be summed over S; draft rows with their factors."""
    if draft is None or drafts is None:
        return linear.parts(x)
    return draft.parts(linear, x, drafts)


def _rope_table(config: TransformerConfig, max_len: int, device: torch.device) -> Tensor:
    """Return [max_len, hd] fp32, cosines before sines of every canvas position."""
    cos, sin, _ = rotary(torch.arange(max_len, device=device)[None], config)
    half = config.head_dim // 2
    return torch.cat([cos[0, :, 0, :half], sin[0, :, 0, :half]], dim=1).contiguous()
