"""Which family a folder is taken for, and what is refused until somebody says."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

import d2f_stream
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_runtime.models.published import Published, read_published
from d2f_stream.core.errors import UnsupportedModel
from tiny_checkpoints import FAMILIES, added_tokens, config_of, write_model, write_tokenizer

DIFFCODER_8B = {
    "architectures": ["StableDiffcoderForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_stable_diffcoder.StableDiffcoderForCausalLM"},
    "model_type": "llama", "vocab_size": 155136, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 500000.0, "rope_scaling": None,
    "max_position_embeddings": 8192, "attention_bias": False, "mlp_bias": False,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
NAMED_IN_MAP = {
    "AutoConfig": "configuration_seed_diffcoder.SeedDiffcoderConfig",
    "AutoModelForCausalLM": "modeling_seed_diffcoder.SeedDiffcoderForCausalLM",
}


def read(folder: Path, values: Any, *, family: str | None = None) -> Published:
    folder.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in values.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))
    return read_published(folder, family=family)


def test_stable_diffcoder_as_published(tmp_path: Path) -> None:
    published = read(tmp_path, DIFFCODER_8B)
    config, defaults = published.config, published.defaults(adapted=False)
    assert (config.family, config.mask_id, config.eos_ids) == ("stable-diffcoder", 5, (2,))
    assert (config.prompt_attention, config.native_block_size) == ("grid", 4)
    assert (config.shift_logits, config.max_len, config.norm_eps) == (False, 8192, 1e-6)
    assert (defaults.num_per_step, defaults.block_size, defaults.max_new_tokens) == (1, 4, 128)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["LlamaForCausalLM"], "auto_map": NAMED_IN_MAP},
        {"architectures": ..., "auto_map": NAMED_IN_MAP},
        {"architectures": ...},
        {"auto_map": ...},
        {"architectures": ["LlamaForCausalLM"]},
        {"auto_map": {"AutoModel": "ByteDance/x--modeling.StableDiffcoderModel"}},
    ],
)
def test_older_revisions_and_copies_are_recognised(tmp_path: Path, changes: Any) -> None:
    published = read(tmp_path, DIFFCODER_8B | changes)
    assert published.config.family == "stable-diffcoder"


@pytest.mark.parametrize(
    ("folder", "changes", "message"),
    [
        ("x", {"architectures": ..., "auto_map": ...}, "names no class, as Stable-DiffCoder's may"),
        ("x", {"architectures": ["OtherForCausalLM"], "auto_map": ...}, "class OtherForCausalLM"),
        ("x", {"architectures": ..., "auto_map": {"AutoModel": "modeling.FooModel"}}, "FooModel"),
        (
            "Stable-DiffCoder-8B-Instruct-GPTQ",
            {"architectures": ["LlamaForCausalLM"], "auto_map": ...},
            "lies under a name of Stable-DiffCoder",
        ),
    ],
)
def test_what_could_be_either_is_refused_until_said(
    tmp_path: Path, folder: str, changes: Any, message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message) as caught:
        read(tmp_path / folder, DIFFCODER_8B | changes)
    assert 'family="llama" of load() or family="stable-diffcoder"' in str(caught.value)
    for family, attention in (("llama", "causal"), ("stable-diffcoder", "grid")):
        found = read(tmp_path / folder, DIFFCODER_8B | changes, family=family)
        assert (found.config.family, found.config.prompt_attention) == (family, attention)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["LlamaForCausalLM"], "auto_map": ...},
        {"architectures": ["LlamaModel"], "auto_map": {"AutoTokenizer": ["tokens.Own", None]}},
    ],
)
def test_a_llama_is_a_llama(tmp_path: Path, changes: Any) -> None:
    assert read(tmp_path, DIFFCODER_8B | changes).config.family == "llama"


def test_variants_can_be_said_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny = FAMILIES["a2d-qwen3"]
    write_tokenizer(tmp_path, tiny)
    for said, attention in (("opdlm", "grid"), ("mdlm", "full"), ("bd3lm", "prompt_grid")):
        found = read(tmp_path, config_of(tiny), family=said)
        assert found.config.prompt_attention == attention
    assert not caplog.text
    assert read(tmp_path, config_of(tiny)).config.prompt_attention == "prompt_grid"
    assert 'it is run as bd3lm; family="mdlm" or family="opdlm"' in caplog.text
    with pytest.raises(UnsupportedModel, match="no family 'gemma'; it must be one of llada, Dream"):
        read(tmp_path, config_of(tiny), family="gemma")


async def test_the_option_of_load_decides(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    write_model(tmp_path, "stable-diffcoder")
    values = config_of(FAMILIES["stable-diffcoder"], architectures=..., auto_map=...)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UnsupportedModel, match="say which it is"):
        load_checkpoint(tmp_path)
    async with d2f_stream.load(tmp_path, device="cpu", family="stable-diffcoder") as engine:
        assert engine.info.family == "stable-diffcoder"
        result = await engine.generate([40, 41, 60], max_new_tokens=6).result()
    assert result.usage.steps == result.usage.completion_tokens
    async with d2f_stream.load(tmp_path, device="cpu", family="llama") as engine:
        assert engine.info.family == "llama"


@pytest.mark.parametrize("block_size", [4, 8, 16, 32, 64])
def test_sdar_has_the_blocks_of_its_config(tmp_path: Path, block_size: int) -> None:
    tiny = FAMILIES["sdar"]
    published = read(tmp_path, config_of(tiny, block_size=block_size))
    assert published.config.native_block_size == block_size
    assert published.defaults(adapted=False).block_size == block_size


@pytest.mark.parametrize("place", ["folder", "config"])
def test_sdar_has_the_blocks_of_its_name_where_the_config_is_silent(
    tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    name = "SDAR-4B-Chat-b32"
    folder = tmp_path / (name if place == "folder" else "model")
    changes = {} if place == "folder" else {"_name_or_path": f"JetLM/{name}"}
    silent = config_of(FAMILIES["sdar"], block_size=..., **changes)
    assert read(folder, silent).config.native_block_size == 32
    assert not caplog.text
    told = config_of(FAMILIES["sdar"], **changes)
    assert read(folder, told).config.native_block_size == 4
    assert "has blocks of 4 tokens, but its name says 32" in caplog.text


@pytest.mark.parametrize("model_type", ["a2d-qwen3", "stable-diffcoder"])
def test_mask_that_no_file_names_is_the_published_one(tmp_path: Path, model_type: str) -> None:
    tiny = FAMILIES[model_type]
    write_tokenizer(tmp_path, tiny)
    assert tiny.mask is not None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (tmp_path / name).read_text().replace(tiny.mask, "<other>")
        values = json.loads(text)
        values.pop("mask_token", None)
        (tmp_path / name).write_text(json.dumps(values))
    wanted = {"a2d-qwen3": 151669, "stable-diffcoder": 5}[model_type]
    config = config_of(tiny, vocab_size=152000)
    assert read(tmp_path, config).config.mask_id == wanted
    named = added_tokens(tiny)["<|mask|>" if model_type == "a2d-qwen3" else "<[MASK]>"]
    assert read(tmp_path, config | {"mask_token_id": named}).config.mask_id == named


@pytest.mark.parametrize(
    ("folder", "threshold"),
    [("TraDo-8B-Thinking", 0.9), ("models--Gen-Verse--TraDo-4B-Instruct", 0.9), ("x", 0.85)],
)
def test_trado_has_its_own_threshold(tmp_path: Path, folder: str, threshold: float) -> None:
    published = read(tmp_path / folder, config_of(FAMILIES["sdar"]))
    defaults = published.defaults(adapted=False)
    assert (defaults.confidence_threshold, defaults.block_size) == (threshold, 4)
    assert published.config.prompt_attention == "grid"


def test_exactly_the_threshold_is_enough_for_stable_diffcoder() -> None:
    preset = d2f_stream.PRESETS["stable-diffcoder-threshold"]
    assert preset.confidence_threshold < 0.95
    assert math.nextafter(preset.confidence_threshold, 1) == 0.95
