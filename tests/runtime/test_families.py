"""What the files of a published folder are read as."""

import json
from pathlib import Path
from typing import Any

import pytest

from d2f_runtime.models.families import PUBLISHED
from d2f_runtime.models.layouts import published_name
from d2f_runtime.models.published import Published, read_published
from d2f_runtime.models.rope_scaling import Llama3Rope
from d2f_stream.core.errors import ModelDamaged, UnsupportedModel
from tiny_checkpoints import FAMILIES, added_tokens, config_of, write_tokenizer


def read(folder: Path, kind: str, *, generation: Any = None, **changes: Any) -> Published:
    tiny = FAMILIES[kind]
    write_tokenizer(folder, tiny)
    (folder / "config.json").write_text(json.dumps(config_of(tiny, **changes)))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return read_published(folder)


# The published values: config.json of each repository, without a tokenizer beside it.
LLADA_8B = {
    "block_type": "llama", "d_model": 4096, "embedding_size": 126464, "eos_token_id": 126081,
    "layer_norm_type": "rms", "mask_token_id": 126336, "max_sequence_length": 4096,
    "mlp_hidden_size": 12288, "model_type": "llada", "n_heads": 32, "n_kv_heads": 32,
    "n_layers": 32, "rms_norm_eps": 1e-05, "rope": True, "rope_theta": 500000.0,
    "vocab_size": 126464, "weight_tying": False, "activation_type": "silu",
}  # fmt: skip
DREAM_7B = {
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584,
    "intermediate_size": 18944, "mask_token_id": 151666, "max_position_embeddings": 131072,
    "model_type": "Dream", "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "tie_word_embeddings": False, "vocab_size": 152064,
}  # fmt: skip


def test_llada_as_published(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLADA_8B))
    config = read_published(tmp_path).config
    assert (config.mask_id, config.eos_ids) == (126336, (126081, 126348))
    assert (config.num_layers, config.hidden_size, config.ffn_size) == (32, 4096, 12288)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (32, 32, 128)
    assert (config.rope_theta, config.norm_eps, config.max_len) == (500_000, 1e-5, 4096)
    assert (config.prompt_attention, config.shift_logits, config.qkv_bias) == ("full", False, False)
    assert config.kv_bytes_per_token // 2 == 512 * 1024


def test_dream_as_published(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DREAM_7B))
    config = read_published(tmp_path).config
    assert (config.mask_id, config.eos_ids) == (151666, (151643, 151645))
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (28, 4, 128)
    assert (config.prompt_attention, config.shift_logits, config.qkv_bias) == ("full", True, True)
    assert config.max_len == 131_072
    assert config.kv_bytes_per_token // 2 == 56 * 1024


@pytest.mark.parametrize("model_type", list(PUBLISHED))
def test_ids_are_those_of_the_folders_own_tokenizer(tmp_path: Path, model_type: str) -> None:
    tiny = FAMILIES[model_type]
    ids = added_tokens(tiny)
    config = read(tmp_path, model_type).config
    assert config.eos_ids == tuple(sorted(ids[text] for text in tiny.ends))
    assert config.num_tokens == max(ids.values()) + 1 <= config.vocab_size
    assert config.mask_id == (config.vocab_size if tiny.mask is None else ids[tiny.mask])
    grid = tiny.attention if isinstance(tiny.attention, int) else None
    assert config.prompt_attention == ("grid" if grid else tiny.attention)
    trained = tiny.config.get("block_size", 1 if tiny.mask is None else 32)
    assert config.native_block_size == (grid or trained)


@pytest.mark.parametrize(
    ("name", "attention", "block_size", "per_step"),
    [
        ("Qwen3-0.6B-diffusion-bd3lm-v0.1", "prompt_grid", 32, 1),
        ("Qwen3-0.6B-diffusion-mdlm-v0.1", "full", 32, 1),
        ("OPDLM-4B", "grid", 4, 1),
        ("Qwen3-4B-a2d-init", "grid", 4, 1),
    ],
)
@pytest.mark.parametrize("place", ["folder", "config", "hub"])
def test_converted_models_are_told_by_their_names(
    tmp_path: Path, name: str, attention: str, block_size: int, per_step: int, place: str
) -> None:
    folder, changes = tmp_path / "model", {}
    if place == "folder":
        folder = tmp_path / name
    elif place == "config":
        changes = {"_name_or_path": f"org/{name}"}
    else:
        folder = tmp_path / f"models--org--{name}" / "snapshots" / "abc"
    published = read(folder, "a2d-qwen3", **changes)
    config, defaults = published.config, published.defaults(adapted=False)
    assert (config.family, config.prompt_attention) == ("a2d", attention)
    assert (config.native_block_size, config.shift_logits) == (block_size, False)
    assert (defaults.block_size, defaults.num_per_step) == (block_size, per_step)
    assert (defaults.attention == "full") == (attention == "full")
    assert defaults.commit == "filled"


def test_converted_models_take_the_block_size_that_their_config_is_given(tmp_path: Path) -> None:
    config = read(tmp_path, "a2d-qwen3", block_size=16).config
    assert (config.native_block_size, config.max_block_size) == (16, 16)


@pytest.mark.parametrize("model_type", ["a2d-qwen3", "qwen3", "sdar"])
def test_heads_have_qwen3s_size_where_the_config_is_silent(tmp_path: Path, model_type: str) -> None:
    assert read(tmp_path, model_type, head_dim=...).config.head_dim == 128


def test_mask_is_found_by_its_text_where_the_config_lacks_it(tmp_path: Path) -> None:
    config = read(tmp_path, "sdar", mask_token_id=...).config
    assert config.mask_id == added_tokens(FAMILIES["sdar"])["<|MASK|>"]


def test_llama3_positions_are_stretched(tmp_path: Path) -> None:
    assert read(tmp_path, "llama").config.rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 64)
    scaling = {"rope_type": "ntk", "factor": 4.0}
    with pytest.raises(UnsupportedModel, match="'ntk', but this build knows default"):
        read(tmp_path, "qwen2", rope_scaling=scaling)


def test_newer_configs_keep_theta_among_the_rope_parameters(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 777.0}
    config = read(tmp_path, "qwen3", rope_theta=..., rope_scaling=..., rope_parameters=rope).config
    assert (config.rope_theta, config.rope_scaling) == (777.0, None)


WINDOWED = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("qwen2", {"quantization_config": {"bits": 4}}, "asks for a quantization"),
        ("qwen2", WINDOWED, r"'sliding_attention' \(sliding_window 64\)"),
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llada", {"block_type": "sequential"}, "block_type 'sequential'"),
        ("llada", {"attention_layer_norm": True}, "attention_layer_norm True"),
        ("Dream", {"block_size": 32}, "a Dream with a block_size of its own"),
        ("Dream", {"model_type": "gemma"}, "'gemma', but this build runs llada, Dream, sdar"),
        ("Dream", {"model_type": None}, "model_type None"),
    ],
)
def test_variants_are_refused_by_name(
    tmp_path: Path, model_type: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        read(tmp_path, model_type, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": ...}, r"config\.json lacks hidden_size"),
        ({"hidden_size": "64"}, "hidden_size is '64' but must be a positive integer"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0 but must be a positive number"),
        ({"tie_word_embeddings": 1}, "must be true or false"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x' but must name token ids"),
        ({"vocab_size": 200}, "ids, but the model embeds 200; it belongs to another model"),
        ({"mask_token_id": 310}, r"has no mask token, .* <\|mask\|>; config\.json says .* 310"),
    ],
)
def test_configs_that_make_no_sense(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelDamaged, match=message):
        read(tmp_path, "Dream", **changes)


def test_tokenizer_without_mask_or_eos(tmp_path: Path) -> None:
    with pytest.raises(ModelDamaged, match=r"has no mask token, which a sdar model calls <\|MASK"):
        read_without(tmp_path, "<|MASK|>", mask_token_id=...)
    with pytest.raises(ModelDamaged, match=r"nothing in .* says which token ends an answer"):
        read_without(tmp_path, "<|endoftext|>", "<|im_end|>", eos_token_id=...)


def read_without(folder: Path, *texts: str, **changes: Any) -> Published:
    """Read an SDAR whose tokenizer does not know the tokens."""
    read(folder, "sdar", **changes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = (folder / name).read_text()
        for text in texts:
            content = content.replace(text, text.replace("|", "?"))
        values = json.loads(content)
        values.pop("mask_token", None)
        values.pop("eos_token", None)
        (folder / name).write_text(json.dumps(values))
    return read_published(folder)


def test_generation_config_lies_over_the_familys_defaults(tmp_path: Path) -> None:
    published = read(tmp_path, "sdar", generation={"eos_token_id": [7, 8], "max_new_tokens": 99})
    defaults = published.defaults(adapted=False)
    assert {7, 8} < set(published.config.eos_ids)
    assert (defaults.max_new_tokens, defaults.block_size, defaults.temperature) == (99, 4, 0.0)
    assert (defaults.confidence_threshold, defaults.max_active_blocks) == (0.85, 1)


@pytest.mark.parametrize(
    ("model_type", "generation", "sampling"),
    [
        ("qwen2", {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}, (0.7, 0.8)),
        ("qwen2", {"do_sample": True}, (1.0, 1.0)),
        ("qwen2", {"temperature": 0.7, "top_p": 0.8}, (0.0, 1.0)),
        ("qwen2", {"do_sample": False, "temperature": 0.7}, (0.0, 1.0)),
        ("Dream", {"temperature": 0.2, "top_p": 0.95}, (0.2, 0.95)),
        ("Dream", {}, (0.0, 1.0)),
    ],
)
def test_sampling_is_that_of_transformers(
    tmp_path: Path, model_type: str, generation: Any, sampling: tuple[float, float]
) -> None:
    defaults = read(tmp_path, model_type, generation=generation).defaults(adapted=False)
    assert (defaults.temperature, defaults.top_p) == sampling


def test_generation_config_out_of_range_is_damage(tmp_path: Path) -> None:
    generation = {"do_sample": True, "temperature": -1}
    with pytest.raises(ModelDamaged, match=r"generation_config\.json: temperature is -1"):
        read(tmp_path, "qwen2", generation=generation).defaults(adapted=False)


def test_the_pipeline_is_for_models_with_an_adapter(tmp_path: Path) -> None:
    published = read(tmp_path, "llada")
    assert published.defaults(adapted=True).max_active_blocks == 4
    assert published.defaults(adapted=False).max_active_blocks == 1


def test_llada_has_two_kinds_of_ff_out() -> None:
    down = published_name("llada", "layers.3.mlp.down_proj.weight")
    assert down == "model.transformer.blocks.3.ff_out.weight"
    assert published_name("llada", "lm_head.weight") == "model.transformer.ff_out.weight"


def test_converted_models_mask_layers_with_windows_like_all_others(tmp_path: Path) -> None:
    windowed = {"layer_types": ["full_attention", "sliding_attention"], **WINDOWED}
    assert read(tmp_path, "a2d-qwen3", **windowed).config.prompt_attention == "prompt_grid"
