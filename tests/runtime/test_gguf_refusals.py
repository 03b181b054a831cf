"""GGUF files that are damaged, contradict themselves, or hold what is not done."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import d2f_stream
from d2f_runtime.gguf.file import GgufFile
from d2f_runtime.models.checkpoints import load_checkpoint, stored_as
from d2f_runtime.text.tokenizer import Tokenizer
from d2f_stream.core.errors import ModelDamaged, ModelError, ModelNotFound, UnsupportedModel
from gguf_loading import logits
from tiny_gguf import (
    oracle,
    write_gguf,
)

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.rope.scaling.type", "yarn"),
        ("llama.rope.scale_linear", 4.0),
        ("llama.expert_count", 8),
        ("llama.attention.sliding_window", 4096),
        ("llama.logit_scale", 0.5),
        ("llama.attention.causal", False),
        ("llama.attention.value_length", 32),
        ("llama.rope.dimension_count", 32),
        ("llama.attention.head_count_kv", [2, 4]),
        ("general.architecture", "gemma3"),
        ("general.type", "adapter"),
        ("split.count", 3),
    ],
)
def test_what_the_transformer_does_not_do_is_refused_by_name(
    tmp_path: Path, key: str, value: Any
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", "llama", oracle("llama"), metadata={key: value})
    named = {
        "general.architecture": "'gemma3'",
        "general.type": "adapter",
        "split.count": "3 files",
    }
    with pytest.raises(UnsupportedModel, match=named.get(key, key)) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("llama.block_count", 3, "holds 2 layers but its metadata says 3"),
        ("llama.block_count", 1 << 30, "holds 2 layers"),
        ("llama.block_count", 1 << 62, "at most 2147483647"),
        ("llama.block_count", None, r"lacks llama\.block_count"),
        ("llama.embedding_length", 1 << 30, r"token_embd\.weight has shape"),
        ("llama.feed_forward_length", 1 << 30, r"ffn_up\.weight has shape"),
        ("llama.feed_forward_length", 0, "must be a positive integer"),
        ("llama.attention.head_count", 1 << 30, r"attn_q\.weight has shape"),
        ("llama.attention.key_length", 1 << 30, "attn_q"),
        ("llama.attention.key_length", (1 << 64) - 1, "at most 2147483647"),
        ("llama.context_length", "long", "must be a positive integer"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "must be a positive number"),
        ("tokenizer.ggml.eos_token_id", 1 << 31, "eos_token_id is 2147483648, but there are"),
    ],
)
def test_metadata_that_contradicts_the_tensors(
    tmp_path: Path, key: str, value: Any, says: str
) -> None:
    changes = {"llama.rope.dimension_count": None, key: value}
    path = write_gguf(tmp_path / "tiny.gguf", "llama", oracle("llama"), metadata=changes)
    with pytest.raises((ModelDamaged, UnsupportedModel), match=says) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)


def test_any_byte_of_the_metadata_may_be_wrong(tmp_path: Path) -> None:
    """Each of 200 damaged files runs, or is refused by one of our errors, which names it."""
    path = write_gguf(tmp_path / "tiny.gguf", "llama", oracle("llama"), stored="Q4_K")
    good = path.read_bytes()
    weights = min(tensor.start for tensor in GgufFile.open(path).tensors.values())
    lists = range(good.index(b"tokenizer.ggml.tokens") + 60, good.index(b"tokenizer.ggml.bos") - 8)
    places = [place for place in range(8, weights) if place not in lists]
    rng = random.Random(0)
    wrong = [b"\xff" * 8, bytes(8), b"\0\0\xc0\x7f", b"\1\0\0\0", b"\0\0\x10\0"]  # with a NaN
    num_refused = 0
    for _ in range(200):
        content = bytearray(good)
        place, value = rng.choice(places), rng.choice([*wrong, rng.randbytes(1)])
        content[place : place + len(value)] = value
        path.write_bytes(content)
        try:
            Tokenizer.from_folder(path).encode("It's 1234 <think>")
            stored_as(path)
            logits(load_checkpoint(path))
        except ModelError as error:
            num_refused += str(path) in str(error)
    assert 100 < num_refused < 200


def test_tensors_are_named_as_the_file_names_them(tmp_path: Path) -> None:
    model = oracle("qwen2")
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "qwen2", model, tensors={"blk.1.ffn_gate.weight": torch.ones(8, 256)})
    with pytest.raises(ModelDamaged, match=r"blk\.1\.ffn_gate\.weight has shape \(8, 256\)"):
        load_checkpoint(path)
    write_gguf(path, "qwen2", model, tensors={"blk.1.ssm_a.weight": torch.ones(8, 256)})
    with pytest.raises(ModelDamaged, match=r"unknown tensor blk\.1\.ssm_a\.weight"):
        load_checkpoint(path)
    del model.model.layers[0].self_attn.q_proj.bias
    write_gguf(path, "qwen2", model)
    with pytest.raises(ModelDamaged, match=r"unknown tensor blk\.0\.attn_k\.bias"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere.gguf", r"no model at .*nowhere\.gguf; .* a \.gguf file"),
        ("models", r"pass the GGUF file itself, such as .*tiny\.gguf"),
        ("notes.txt", r"notes\.txt is a file; a model is"),
    ],
)
async def test_model_that_is_no_such_file_says_what_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.gguf").touch()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelNotFound, match=says):
        async with d2f_stream.load(tmp_path / name, device="cpu"):
            pass
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match="no model at"):  # no hub id, whatever it looks like
        async with d2f_stream.load("models/other.gguf", device="cpu"):
            pass


async def test_other_backends_are_told_how_to_get_there(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", "llama", oracle("llama"))
    with pytest.raises(UnsupportedModel, match="which the torch backend runs; for the onnx"):
        async with d2f_stream.load(path, backend="onnx"):
            pass
