"""Our transformer against transformers' own classes, which its parameter names follow."""

from typing import Any

import pytest
import torch
from torch import Tensor

from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.transformer import block_causal_mask, head_states
from d2f_runtime.window import Window
from tiny_models import CONFIGS, MASK, tiny_model

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.torch

CLASSES = {"llada": "Llama", "llama": "Llama", "dream": "Qwen2", "sdar": "Qwen3"}


def oracle(config: TransformerConfig, weights: dict[str, Tensor]) -> Any:
    """The family's transformers model with our weights; eager attention takes any 4-D mask."""
    name = CLASSES[config.family]
    settings = getattr(transformers, f"{name}Config")(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        attention_bias=False,
        attn_implementation="eager",
    )
    model = getattr(transformers, f"{name}ForCausalLM")(settings).eval()
    named = {k if k.startswith("lm_head") else f"model.{k}": v for k, v in weights.items()}
    model.load_state_dict(named)
    return model


@pytest.mark.parametrize("family", list(CONFIGS))
def test_logits_equal_those_of_transformers(family: str) -> None:
    config = CONFIGS[family]
    ours = tiny_model(config)
    theirs = oracle(config, ours.state_dict())
    tokens = torch.randint(4, 150, (2, 29), generator=torch.Generator().manual_seed(1))
    tokens[:, 20:26] = MASK
    stops = tuple(range(1, 30)) if config.prompt_attention == "causal" else (11, 17, 21, 29)
    canvas = Window(start=0, tokens=(0,) * 29, num_to_cache=0, block_stops=stops)
    visible = torch.tensor([canvas.visible_until()] * 2)
    mask = block_causal_mask(torch.zeros(2, dtype=torch.long), visible, 0)
    with torch.no_grad():
        hidden, _ = ours(tokens, torch.arange(29)[None], mask)
        additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        wanted = theirs(tokens, attention_mask=additive, use_cache=False).logits
        error = (ours.logits(hidden) - wanted).abs().max()
    assert error <= 1e-4  # logits of about 30 in fp32, summed in another order


def test_mask_shows_the_cache_and_the_own_block() -> None:
    mask = block_causal_mask(torch.tensor([2, 0]), torch.tensor([[4, 4, 5], [1, 3, 3]]), 3)
    first, second = (mask[:, 0] * 1).tolist()
    assert first == [[1, 1, 0, 1, 1, 0], [1, 1, 0, 1, 1, 0], [1, 1, 0, 1, 1, 1]]
    assert second == [[0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1]]


def test_shifted_heads_begin_with_the_last_cached_state() -> None:
    hidden = torch.arange(6.0).view(1, 3, 2)
    last = torch.tensor([[8.0, 9.0]])
    rows = torch.tensor([[0, 2]])
    assert head_states(hidden, last, rows, shift=True).tolist() == [[[8.0, 9.0], [2.0, 3.0]]]
    assert head_states(hidden, last, rows, shift=False).tolist() == [[[0.0, 1.0], [4.0, 5.0]]]
