"""Damaged and foreign checkpoints: one clear error each, before any weight is read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import d2f_stream
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_runtime.models.shards import Shards
from d2f_stream.core.errors import D2FError, ModelDamaged, ModelNotFound, UnsupportedModel
from tiny_checkpoints import write_model

pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sharded LLaDA whose weights must never be reached."""
    write_model(tmp_path, "llada", num_shards=3)

    def tensors(*args: object) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(Shards, "tensors", tensors)
    return tmp_path


def change(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def refusal(folder: Path) -> D2FError:
    with pytest.raises(D2FError) as caught:
        load_checkpoint(folder)
    return caught.value


def test_truncated_shard(folder: Path) -> None:
    path = folder / SHARD
    path.write_bytes(path.read_bytes()[:-100])
    error = refusal(folder)
    assert isinstance(error, ModelDamaged)
    assert f"{SHARD} cannot be read" in str(error)


def test_index_that_names_a_missing_file(folder: Path) -> None:
    (folder / SHARD).unlink()
    error = refusal(folder)
    assert isinstance(error, ModelDamaged)
    assert f"names {SHARD}, which {folder} does not hold" in str(error)


def test_index_that_names_a_tensor_elsewhere(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.transformer.ln_f.weight"] = SHARD
    index["weight_map"]["model.transformer.wte.weight"] = SHARD
    (folder / INDEX).write_text(json.dumps(index))
    assert "it does not" in str(refusal(folder))


@pytest.mark.parametrize("weight_map", [{}, {"a": "../b.safetensors"}, {"a": 1}, []])
def test_index_that_makes_no_sense(folder: Path, weight_map: object) -> None:
    change(folder / INDEX, weight_map=weight_map)
    error = refusal(folder)
    assert isinstance(error, ModelDamaged)
    assert INDEX in str(error)


def rewrite(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Replace a tensor, drop it, or add it, in shard and index."""
    weights = load_file(folder / SHARD)
    index = json.loads((folder / INDEX).read_text())
    weights.pop(name, None)
    index["weight_map"].pop(name, None)
    if tensor is not None:
        weights[name] = tensor
        index["weight_map"][name] = SHARD
    save_file(weights, folder / SHARD)
    (folder / INDEX).write_text(json.dumps(index))


def test_tensors_are_named_as_the_checkpoint_names_them(folder: Path) -> None:
    held = json.loads((folder / INDEX).read_text())["weight_map"]
    name = next(n for n, file in held.items() if file == SHARD and "_proj" in n)
    tensor = load_file(folder / SHARD)[name]
    rewrite(folder, name, None)
    assert f"lacks the tensor {name} (1 in all)" in str(refusal(folder))
    rewrite(folder, name, tensor[1:].clone())
    assert f"{name} has shape" in str(refusal(folder))
    rewrite(folder, name, tensor.to(torch.int8))
    error = refusal(folder)
    assert isinstance(error, UnsupportedModel)
    assert f"{name} is stored as I8" in str(error)
    rewrite(folder, name, tensor)
    rewrite(folder, "model.transformer.blocks.7.q_proj.weight", torch.ones(2))
    assert "unknown tensor model.transformer.blocks.7.q_proj.weight" in str(refusal(folder))


def test_buffers_of_older_versions_are_passed_over(tmp_path: Path) -> None:
    write_model(tmp_path, "qwen2")
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "lm_head.weight": weights["model.embed_tokens.weight"].clone(),  # the model ties its head
    }
    save_file(weights | extra, path)
    model = load_checkpoint(tmp_path)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert model.lm_head.weight.std() > 0


def test_scales_of_a_cache_in_fp8_are_passed_over(tmp_path: Path) -> None:
    write_model(tmp_path, "nemotron_labs_diffusion")
    path = tmp_path / "model.safetensors"
    scales = {f"encoder.layers.1.self_attn.{part}_scale": torch.tensor(0.5) for part in "kv"}
    weights = load_file(path)
    save_file(weights | scales, path)
    model = load_checkpoint(tmp_path)
    name = "layers.1.self_attn.k_proj.weight"
    assert torch.equal(model.state_dict()[name], weights[f"encoder.{name}"])


def oracle_of(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("has_embedding", [True, False])
def test_tied_head_is_what_transformers_makes_of_it(tmp_path: Path, has_embedding: bool) -> None:
    write_model(tmp_path, "qwen2")
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0)
    if not has_embedding:
        del weights["model.embed_tokens.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    ours, theirs = load_checkpoint(tmp_path), oracle_of(tmp_path)
    assert ours.config.tie_embeddings == (not has_embedding)
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
    assert torch.equal(ours.embed_tokens.weight, theirs.model.embed_tokens.weight)


def test_tensor_in_two_shards_is_that_of_the_index(tmp_path: Path) -> None:
    write_model(tmp_path, "llada", num_shards=3)
    wanted = load_checkpoint(tmp_path).state_dict()
    index = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    for other in sorted(set(index.values())):  # copies in every other shard, zeroed
        held = load_file(tmp_path / other)
        stale = {n: torch.zeros_like(t) for n, t in all_tensors(tmp_path, index).items()}
        save_file({n: t for n, t in stale.items() if index[n] != other} | held, tmp_path / other)
    found = load_checkpoint(tmp_path).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def all_tensors(folder: Path, index: dict[str, str]) -> dict[str, torch.Tensor]:
    files = {file: load_file(folder / file) for file in set(index.values())}
    return {name: files[file][name] for name, file in index.items()}


def test_tensor_that_lies_twice_and_has_no_place_in_the_index(folder: Path) -> None:
    extra = {"model.transformer.extra.weight": torch.ones(2)}
    files = sorted(path.name for path in folder.glob("model-*.safetensors"))[:2]
    for file in files:
        save_file(load_file(folder / file) | extra, folder / file)
    error = refusal(folder)
    assert isinstance(error, ModelDamaged)
    assert all(file in str(error) for file in files)


def test_more_layers_than_tensors_are_refused_before_they_are_laid_out(folder: Path) -> None:
    change(folder / "config.json", n_layers=100_000)
    assert "asks for 100000 layers" in str(refusal(folder))
    change(folder / "config.json", n_layers=2, d_model=2**62)
    assert f"d_model is {2**62}" in str(refusal(folder))
    change(folder / "config.json", d_model=2**30)
    assert "is no model's" in str(refusal(folder))


async def test_pickles_are_refused_by_name(tmp_path: Path) -> None:
    write_model(tmp_path, "Dream")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    for backend in ("auto", "torch"):
        with pytest.raises(UnsupportedModel, match=r"pickled weights only \(pytorch_model\.bin\)"):
            async with d2f_stream.load(tmp_path, backend=backend, device="cpu"):
                pass


async def test_unknown_families_are_named_with_the_known_ones(folder: Path) -> None:
    change(folder / "config.json", model_type="diffusion_gemma")
    with pytest.raises(
        UnsupportedModel, match=r"'diffusion_gemma', but this build runs llada, Dream"
    ):
        async with d2f_stream.load(folder, device="cpu"):
            pass


async def test_folder_without_tokenizer_says_so(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelNotFound, match=r"no tokenizer in .*vocab\.json"):
        async with d2f_stream.load(folder, device="cpu"):
            pass


async def test_prompt_beyond_the_models_positions_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "llada")
    async with d2f_stream.load(tmp_path, device="cpu") as engine:
        with pytest.raises(d2f_stream.PromptTooLong, match="holds 256 in all"):
            await engine.generate([5] * 250, max_new_tokens=32).result()
