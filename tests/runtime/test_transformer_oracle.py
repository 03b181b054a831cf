"""Our transformer against transformers' own classes, which its parameter names follow."""

import pytest
import torch

from d2f_runtime.decoding.window import Window
from d2f_runtime.models.masks import block_causal_mask
from tiny_models import CONFIGS, MASK, tiny_model

pytest.importorskip("transformers")

from transformers_oracle import oracle_model

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("family", list(CONFIGS))
def test_logits_equal_those_of_transformers(family: str) -> None:
    config = CONFIGS[family]
    ours = tiny_model(config)
    theirs = oracle_model(config, ours.state_dict())
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
