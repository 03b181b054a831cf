"""The bench's verified decoding gives the base's own answer, whatever drafts and thresholds are."""

import numpy as np
import pytest
import torch

from d2f_export.distill.from_ar.draft_adapter import adapter_layers, new_adapter
from d2f_export.distill.from_ar.streams import named_weights, streams_of
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.transformer import Transformer
from lab.bench.draft_decoding import Decoding, decode_verified

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("confidence", [0.0, 0.03, 0.5])
@pytest.mark.parametrize(("block_size", "active"), [(2, 1), (2, 3), (4, 2)])
def test_verified_answers_are_the_bases_own(
    block_size: int, active: int, confidence: float
) -> None:
    config = TransformerConfig(
        family="llama", vocab_size=40, num_tokens=40, hidden_size=24, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=8, ffn_size=40, mask_id=40, eos_ids=(2,), shift_logits=True,
        prompt_attention="causal", tie_embeddings=True,
    )  # fmt: skip
    model = Transformer(config)
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    factors = new_adapter(config, rank=4, seed=0, table=model.embed_tokens.weight.detach())
    random = np.random.default_rng(1)
    prompts = [random.integers(3, 40, n % 5 + 2).tolist() for n in range(5)]
    found = decode_verified(
        streams_of(config, named_weights(model), compiled=False),
        adapter_layers(factors, 2),
        factors["mask_embedding"],
        prompts,
        Decoding(block_size, active, confidence),
        max_new=24,
        end_id=2,
    )
    for prompt, answer, steps in zip(prompts, found.answers, found.steps, strict=True):
        assert answer == _greedy(model, prompt, len(answer))
        assert len(answer) == 24 or answer[-1] == 2
        assert confidence > 0 or steps <= len(answer) + 1


def _greedy(model: Transformer, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            hidden, _ = model(
                torch.tensor([tokens]), torch.arange(len(tokens))[None], None, causal=True
            )
            tokens.append(int(model.logits(hidden[0, -1]).argmax()))
    return tokens[len(prompt) :]
