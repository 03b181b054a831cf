"""The bench's verified decoding gives the base's own answer, whatever drafts and thresholds are."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from d2f_export.distill.from_ar.base import open_ar_base
from d2f_export.distill.from_ar.draft_adapter import adapter_layers, new_adapter
from d2f_export.distill.from_ar.examples import read_examples
from d2f_export.distill.from_ar.run import train_draft
from d2f_export.distill.from_ar.settings import DraftSettings
from d2f_export.distill.from_ar.streams import named_weights, streams_of
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.transformer import Transformer
from lab.bench.draft_decoding import Decoding, decode_verified
from lab.bench.drafts import main
from tiny_checkpoints import write_model

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


def test_bench_measures_an_adapter_that_was_trained(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    base, data = tmp_path / "base", tmp_path / "d.jsonl"
    write_model(base, "qwen2")
    lines = [{"prompt": f"Ann has {n}", "answer": f"{n} apples, and so on"} for n in range(12)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = DraftSettings(
        from_ar=str(base), data=(str(data),), rank=4, rows=1, clean_length=128, noisy_length=128,
        steps=3, block_sizes=(2, 4),
    )  # fmt: skip
    train_draft(settings, tmp_path / "run", cpu=True)
    read_examples(settings, open_ar_base(str(base)))[0].write(tmp_path / "held.npz")
    output = tmp_path / "record.json"
    main(
        ["--base", str(base), "--adapter", str(tmp_path / "run"), "--cpu", "--rows", "1",
         "--held-out", str(tmp_path / "held.npz"), "--prompts", f"sums={data}", "--number", "3",
         "--grid", "2:1:0", "4:2:0.5", "--max-new", "12", "--output", str(output)]
    )  # fmt: skip
    results = json.loads(output.read_text())["results"]
    assert [found["block_size"] for found in results["one_step"]] == [2, 4]
    assert all(1.0 <= found["length"] <= found["block_size"] + 1 for found in results["one_step"])
    assert all(found["same_as_ar"] == 1.0 for found in results["decoding"])
    assert results["decoding"][0]["sums"] == results["decoding"][0]["tokens_per_step"]
