"""FastLayer: a layer's weights as the fast step wants them, packed from the plain model's."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from d2f_runtime.kernels import gate, rope
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.draft_adapter import DraftAdapter, product_shapes
from d2f_runtime.models.fast_draft import FastLayerDraft
from d2f_runtime.models.fast_mixture import FastMixture
from d2f_runtime.models.feed_forward import FeedForward
from d2f_runtime.models.mixture import Mixture
from d2f_runtime.models.transformer import Layer, RMSNorm
from d2f_runtime.quantization.linear import PackedLinear, pack
from d2f_runtime.quantization.stored import StoredWeight, join_outputs, stored_weight

__all__ = ["FastFeedForward", "FastLayer", "pack_layer"]


@dataclass(frozen=True, slots=True)
class FastFeedForward:
    """A dense feed-forward: gate and up as one product, and down."""

    gate_up: PackedLinear
    down: PackedLinear


@dataclass(frozen=True, slots=True)
class FastLayer:
    """The packed weights of one layer."""

    input_norm: Tensor
    qkv: PackedLinear
    qkv_bias: Tensor | None
    head_norms: rope.HeadNorms | None
    out: PackedLinear
    ffn_norm: Tensor
    feed_forward: FastFeedForward | FastMixture
    draft: FastLayerDraft | None


def pack_layer(
    layers: nn.ModuleList,
    index: int,
    quantization: str,
    consume: bool,
    draft: DraftAdapter | None,
    config: TransformerConfig,
) -> FastLayer:
    """Pack a layer of the model.

    Args:
        layers: of the model.
        index: of the layer.
        quantization: of its products, see `FastTransformer`.
        consume: take the layer out of `layers` once it is packed.
        draft: adapter of the model.
        config: of the model.
    """
    layer = layers[index]
    assert isinstance(layer, Layer)
    attention = layer.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)

    def cat(*projections: Tensor) -> Tensor:
        return rope.interleave(torch.cat(projections), attention.head_dim)

    bias = None
    if attention.q_proj.bias is not None:
        bias = cat(*(projection.bias for projection in projections))
    norms = None
    query_norm, key_norm = attention.q_norm, attention.k_norm
    if isinstance(query_norm, RMSNorm) and isinstance(key_norm, RMSNorm):
        norms = rope.HeadNorms(query_norm.weight.detach(), key_norm.weight.detach(), query_norm.eps)
    dtype = layer.input_layernorm.weight.dtype

    def packed_of(weight: StoredWeight) -> PackedLinear:
        return pack(weight, quantization, dtype)

    qkv = join_outputs([stored_weight(projection) for projection in projections], cat, dtype)
    packed = FastLayer(
        input_norm=layer.input_layernorm.weight.detach(),
        qkv=packed_of(qkv),
        qkv_bias=bias,
        head_norms=norms,
        out=packed_of(stored_weight(attention.o_proj)),
        ffn_norm=layer.post_attention_layernorm.weight.detach(),
        feed_forward=_packed_feed_forward(layer.mlp, packed_of, quantization, dtype),
        draft=None if draft is None else _merged_draft(draft, config, index),
    )
    if consume:
        layers[index] = nn.Identity()
    return packed


def _packed_feed_forward(
    mlp: FeedForward | Mixture,
    packed_of: Callable[[StoredWeight], PackedLinear],
    quantization: str,
    dtype: torch.dtype,
) -> FastFeedForward | FastMixture:
    if isinstance(mlp, Mixture):
        return FastMixture(mlp, quantization, dtype)
    gate_and_up = [stored_weight(projection) for projection in (mlp.gate_proj, mlp.up_proj)]
    return FastFeedForward(
        packed_of(join_outputs(gate_and_up, gate.interleave, dtype)),
        packed_of(stored_weight(mlp.down_proj)),
    )


def _merged_draft(draft: DraftAdapter, config: TransformerConfig, index: int) -> FastLayerDraft:
    return FastLayerDraft.of(
        draft.layer(index, torch.empty(0)),
        {name: shape[0] for name, shape in product_shapes(config).items()},
        lambda ups: rope.interleave(ups, config.head_dim),
        gate.interleave,
    )
