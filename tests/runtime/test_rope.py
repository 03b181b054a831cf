"""Every way of stretching rotary positions, against transformers' own functions and classes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from d2f_runtime.backends import open_backend
from d2f_runtime.backends.base import StepRow
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.decoding.window import Window
from d2f_runtime.models.checkpoints import load_checkpoint, save_checkpoint
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.published import read_published
from d2f_runtime.models.rope_scaling import YarnRope
from d2f_runtime.models.rotary import attention_factor, query_scale, rotary_frequencies
from d2f_stream.core.errors import ModelDamaged, UnsupportedModel
from tiny_checkpoints import FAMILIES, additive, block_causal, oracle, write_checkpoint
from tiny_models import CONFIGS, MASK, recompute, tiny_model

transformers = pytest.importorskip("transformers")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
pytestmark = pytest.mark.torch

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SHORT = [1.0 + 0.1 * i for i in range(16)]
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "older name": {"type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": YARN,
    "yarn of nemotron": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0},
    "yarn with mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "beta_slow": 2.0},
    "yarn with half an mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 0.0},
    "yarn that shrinks": YARN | {"factor": 0.25},
    "yarn with a factor": YARN | {"attention_factor": 1.5, "truncate": False},
    "yarn without a factor": YARN | {"factor": None},
    "yarn of one pair": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": [9.0] * 16,
        "original_max_position_embeddings": 128,
    },
    "longrope with a factor": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": [9.0] * 16,
        "original_max_position_embeddings": 512,
        "factor": 8.0,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.4, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip


def write(folder: Path, family: str, scaling: Any, **changes: Any) -> Any:
    """Write a tiny checkpoint that stretches its positions; return transformers' model."""
    tiny = FAMILIES[family]
    theirs = oracle(tiny, rope_scaling=dict(scaling), **changes)
    write_checkpoint(folder, tiny, theirs, rope_scaling=scaling, **changes)
    return theirs


@pytest.mark.parametrize("kind", list(KINDS))
def test_frequencies_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    theirs = write(tmp_path, "qwen3", KINDS[kind])
    config = read_published(tmp_path).config
    rope = theirs.model.rotary_emb
    assert torch.allclose(rotary_frequencies(config), rope.inv_freq, rtol=1e-6, atol=0)
    assert attention_factor(config.rope_scaling) == pytest.approx(rope.attention_scaling, abs=1e-12)


@pytest.mark.parametrize("family", ["Dream", "sdar", "a2d-qwen3", "Fast_dLLM_Qwen", "llama"])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn with mscale", "longrope"])
@torch.no_grad()
def test_logits_are_those_of_transformers(tmp_path: Path, family: str, kind: str) -> None:
    size = 32 if FAMILIES[family].config.get("head_dim") else 16
    scaling = KINDS[kind]
    if kind == "longrope":
        scaling = scaling | {key: scaling[key][: size // 2] for key in ("short_factor",)}
        scaling |= {"long_factor": [9.0] * (size // 2)}
    theirs = write(tmp_path, family, scaling)
    length = 100
    tokens = torch.randint(0, 280, (1, length), generator=torch.Generator().manual_seed(1))
    visible = block_causal(length, [30, 61, 70, length])
    wanted = theirs(tokens, attention_mask=additive(visible), use_cache=False).logits
    ours = load_checkpoint(tmp_path)
    hidden, _ = ours(tokens, torch.arange(length)[None], visible[None, None])
    assert (ours.logits(hidden) - wanted).abs().max() <= 1e-4


def test_what_does_not_fit_the_cache_is_not_promised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "qwen3", KINDS["longrope"])
    assert read_published(tmp_path).config.max_len == 128
    assert "prompt and answer may take 128 together" in caplog.text
    write(tmp_path, "qwen3", KINDS["longrope with a factor"])
    assert read_published(tmp_path).config.max_len == 512


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "ntk"}, "'ntk', but this build knows default, dynamic, linear"),
        (YARN | {"partial_rotary_factor": 0.5}, "by partial_rotary_factor"),
        ({"full_attention": YARN}, "of their own for full_attention"),
    ],
)
def test_other_kinds_are_refused(tmp_path: Path, scaling: Any, message: str) -> None:
    tiny = FAMILIES["qwen2"]
    write_checkpoint(tmp_path, tiny, oracle(tiny), rope_scaling=scaling)
    with pytest.raises(UnsupportedModel, match=message):
        read_published(tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("linear", {"factor": 0}, "factor is 0 but must be a positive number"),
        ("longrope", {"short_factor": [1.0]}, "short_factor must be 16 positive numbers"),
        ("yarn", {"truncate": 1}, "truncate is 1 but must be true or false"),
    ],
)
def test_damaged_values_are_named(tmp_path: Path, kind: str, changes: Any, message: str) -> None:
    tiny = FAMILIES["qwen3"]
    write_checkpoint(tmp_path, tiny, oracle(tiny), rope_scaling=KINDS[kind] | changes)
    with pytest.raises(ModelDamaged, match=message):
        read_published(tmp_path)


SCALED = replace(
    CONFIGS["sdar"],
    rope_scaling=YarnRope(2.0, 16, attention_factor=1.2, query_beta=0.3),
    rotary_dim=16,  # half of a head
)


@pytest.mark.parametrize("kind", ["torch", "fast", "onnx"])
@pytest.mark.parametrize("shifted", [False, True])
def test_every_step_turns_alike(tmp_path: Path, kind: str, shifted: bool) -> None:
    config = replace(SCALED, shift_logits=shifted)
    model = tiny_model(config)
    save_checkpoint(tmp_path / "model", model)
    assert load_checkpoint(tmp_path / "model").config == config
    if kind == "onnx":
        from d2f_export.onnx.artefact import Description, write_artefact

        (tmp_path / "tokenizer.json").write_text("{}")
        about = Description(name="x", tokenizer=tmp_path / "tokenizer.json", defaults={"cpu": {}})
        write_artefact(
            tmp_path / "model",
            tmp_path / "onnx",
            about,
            target="cpu",
            quantization="fp32",
            window=24,
            capacity=96,
        )
        backend = open_backend("onnx", tmp_path / "onnx", device="cpu", quantization="auto")
    else:
        backend = TorchBackend(model, name="x", runner="fast" if kind == "fast" else "plain")
    prompt = tuple(range(4, 44))
    slot = backend.open_slot(60)
    first = Window(0, prompt, len(prompt), tuple(range(4, 41, 4)))
    backend.step([StepRow(slot, first)])
    window = Window(40, (MASK, 9, MASK, MASK, MASK, MASK, MASK, MASK), 0, (44, 48))
    (found,) = backend.step([StepRow(slot, window)])
    backend.close()
    wanted = recompute(model, window, prompt, first.block_stops)
    assert list(found.tokens) == list(wanted.tokens)
    assert list(found.confidence) == pytest.approx(list(wanted.confidence), abs=1e-5)


def test_queries_grow_with_their_position() -> None:
    rope = YarnRope(16.0, 100, query_beta=0.1)
    scale = query_scale(torch.tensor([0, 99, 100, 250]), rope)
    assert scale is not None
    wanted = [1.0, 1.0, 1 + 0.1 * float(torch.tensor(2.0).log())]
    assert scale[:3].tolist() == pytest.approx(wanted)
    assert query_scale(torch.tensor([5]), YarnRope(16.0, 100)) is None


def test_configs_keep_their_scaling() -> None:
    for scaling in (YarnRope(2.0, 16), CONFIGS["sdar"].rope_scaling):
        config = replace(CONFIGS["sdar"], rope_scaling=scaling)
        assert TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    older = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "trained_len": 64}
    values = CONFIGS["sdar"].to_dict() | {"rope_scaling": older}
    assert TransformerConfig.from_dict(values).to_dict()["rope_scaling"] == older
