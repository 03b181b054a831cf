"""Models in GGUF files against transformers' own loading of the same files."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import d2f_stream
from d2f_runtime.models import gguf_weights
from d2f_runtime.models.checkpoints import load_checkpoint, stored_as
from d2f_runtime.models.rope_scaling import Llama3Rope
from d2f_runtime.models.stored_weights import read_config
from d2f_stream.core.errors import ModelDamaged, UnsupportedModel
from gguf_loading import TOKENS, logits
from tiny_gguf import (
    K_TYPES,
    TYPES,
    oracle,
    tokens_of,
    vocabulary,
    write_gguf,
)

transformers = pytest.importorskip("transformers")


gguf = pytest.importorskip("gguf")


pytestmark = pytest.mark.torch
TOLERANCE = 2e-4  # logits of about 30 in fp32, summed in another order
ARCHITECTURES = ("llama", "qwen2", "qwen3")


@torch.no_grad()
def ours(path: Path, **options: Any) -> Tensor:
    return logits(load_checkpoint(path, **({"dtype": torch.float32} | options)))


@torch.no_grad()
def theirs(path: Path) -> Tensor:
    """What transformers makes of the same file."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    found: Tensor = model.eval()(TOKENS).logits
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_the_model_that_was_written_and_transformers(
    tmp_path: Path, architecture: str, tied: bool
) -> None:
    model = oracle(architecture, tied=tied)
    path = write_gguf(tmp_path / "tiny.gguf", architecture, model)
    found = ours(path)
    with torch.no_grad():
        written = model(TOKENS).logits
    assert written.std() > 1
    torch.testing.assert_close(found, written, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found, theirs(path), atol=TOLERANCE, rtol=0)
    assert read_config(path).tie_embeddings == tied


@pytest.mark.parametrize("stored", [*TYPES[1:], *K_TYPES])
def test_logits_of_every_type_equal_transformers(tmp_path: Path, stored: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", "llama", oracle("llama"), stored=stored)
    found, wanted = ours(path), theirs(path)
    assert 0.5 < wanted.std() < 100
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize("stored", ["Q4_0", "Q4_1", "Q8_0", *K_TYPES])
@pytest.mark.parametrize("piece", [gguf_weights.PIECE, 1, 1500])
def test_blocks_are_unpacked_as_by_another_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str, piece: int
) -> None:
    """transformers' own kernels in torch share nothing with gguf-py, which unpacks here."""
    from transformers.integrations.gguf import dequant

    monkeypatch.setattr(gguf_weights, "PIECE", piece)
    path = write_gguf(tmp_path / "tiny.gguf", "qwen2", oracle("qwen2"), stored=stored)
    found = load_checkpoint(path).state_dict()["layers.1.mlp.down_proj.weight"]
    (tensor,) = [t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_down.weight"]
    blocks = torch.from_numpy(tensor.data.copy())
    wanted = dequant.dequantize(blocks, tensor.tensor_type.value).reshape(256, 512)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("stored", "steps"), [("Q5_0", 32), ("Q5_1", 31), ("Q8_0", 254)])
def test_blocks_are_as_near_to_the_weights_as_their_bits_allow(
    tmp_path: Path, stored: str, steps: int
) -> None:
    model = oracle("qwen2")
    path = write_gguf(tmp_path / "tiny.gguf", "qwen2", model, stored=stored)
    found = load_checkpoint(path).state_dict()["layers.1.mlp.down_proj.weight"].view(-1, 32)
    wanted = model.state_dict()["model.layers.1.mlp.down_proj.weight"].view(-1, 32)
    has_minimum = stored == "Q5_1"  # the others go as far below zero as above
    spread = wanted.amax(1) - wanted.amin(1) if has_minimum else 2 * wanted.abs().amax(1)
    assert ((found - wanted).abs().amax(1) <= 1.02 * spread / steps).all()


def test_llama_with_biases_has_them_in_pairs_too(tmp_path: Path) -> None:
    model = oracle("llama", attention_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.bias.zero_()
    path = write_gguf(tmp_path / "whole.gguf", "llama", model)
    with pytest.raises(
        ModelDamaged, match=r"unknown tensor blk\.0\.attn_output\.bias \(2 in all\)"
    ):
        load_checkpoint(path)
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias = None
    found = ours(write_gguf(tmp_path / "tiny.gguf", "llama", model))
    with torch.no_grad():
        torch.testing.assert_close(found, model(TOKENS).logits, atol=TOLERANCE, rtol=0)


def test_positions_stretched_as_llama3_are_obeyed(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = oracle("llama", rope_parameters=scaling, max_position_embeddings=131_072)
    plain = oracle("llama", rope_theta=500_000.0).model.rotary_emb.inv_freq
    divisors = plain / model.model.rotary_emb.inv_freq
    assert {1.0, 32.0} < {round(value, 3) for value in divisors.tolist()}
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama", model, tensors={"rope_freqs.weight": divisors})
    assert read_config(path).rope_scaling == Llama3Rope(32.0, 1.0, 4.0, 8192)
    with torch.no_grad():
        torch.testing.assert_close(ours(path), model(TOKENS).logits, atol=TOLERANCE, rtol=0)
    write_gguf(path, "llama", model, tensors={"rope_freqs.weight": divisors.sqrt()})
    with pytest.raises(UnsupportedModel, match="not llama3's"):
        read_config(path)
    write_gguf(path, "llama", model, tensors={"rope_freqs.weight": torch.ones(32)})
    assert read_config(path).rope_scaling is None


def test_unused_rows_are_never_produced(tmp_path: Path) -> None:
    num_tokens = len(vocabulary()[0])
    model = oracle("qwen2", vocab_size=num_tokens + 26)
    config = read_config(write_gguf(tmp_path / "tiny.gguf", "qwen2", model, unused=26))
    assert (config.num_tokens, config.vocab_size) == (num_tokens, num_tokens + 26)


def test_every_token_that_ends_an_answer_does(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    model = oracle("llama")
    (other,) = tokens_of("<|mask|>")
    write_gguf(path, "llama", model, metadata={"tokenizer.ggml.eot_token_id": other})
    assert set(read_config(path).eos_ids) == {other, *tokens_of("<|endoftext|>", "<|im_end|>")}
    types = [1] * len(vocabulary()[0])
    nothing = {"tokenizer.ggml.eos_token_id": None, "tokenizer.ggml.token_type": types}
    write_gguf(path, "llama", model, metadata=nothing)
    with pytest.raises(ModelDamaged, match="which token ends an answer"):
        read_config(path)


@pytest.mark.parametrize(
    ("stored", "kept", "dtype"),
    [
        ("F16", "fp16", torch.float16),
        ("BF16", "bf16", torch.bfloat16),
        ("F32", "fp32", torch.float32),
        ("Q4_K", "Q4_K", torch.float32),
    ],
)
def test_file_says_how_it_stores_and_the_log_what_is_kept(
    tmp_path: Path, stored: str, kept: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", "llama", oracle("llama"), stored=stored)
    assert stored_as(path).quantization == kept
    with caplog.at_level(logging.INFO):
        model = load_checkpoint(path)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    told = (
        "holds its weights as Q4_K in 1 MiB; its own bits are not kept, in memory they take 5 MiB"
    )
    assert (told in caplog.text) == (stored == "Q4_K")
    assert caplog.text == "" or stored == "Q4_K"


async def test_greedy_answers_equal_generate_of_transformers(tmp_path: Path) -> None:
    for architecture in ARCHITECTURES:
        path = tmp_path / f"{architecture}.gguf"
        model = oracle(architecture, tied=True)
        write_gguf(path, architecture, model, stored="Q8_0")
        reference = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
        async with d2f_stream.load(str(path), device="cpu") as engine:
            assert engine.info.name == path.name
            result = await engine.generate(TOKENS[0, :20].tolist(), max_new_tokens=24).result()
            with torch.no_grad():
                wanted = reference.generate(
                    TOKENS[:, :20],
                    max_new_tokens=24,
                    do_sample=False,
                    eos_token_id=list(read_config(path).eos_ids),
                    pad_token_id=0,
                )
            assert list(result.token_ids) == wanted[0, 20:].tolist()
            with pytest.raises(d2f_stream.PromptTooLong, match="holds 512 in all"):
                await engine.generate([5] * 500, max_new_tokens=32).result()


async def test_draft_adapter_leaves_the_answers_the_files_own(tmp_path: Path) -> None:
    from tiny_drafts import write_draft_adapter

    path = write_gguf(tmp_path / "tiny.gguf", "llama", oracle("llama"), stored="Q8_0")
    (mask_id,) = tokens_of("<|mask|>")
    write_draft_adapter(tmp_path / "adapter", read_config(path), mask_id=mask_id)
    answers = []
    for adapter in (None, tmp_path / "adapter"):
        async with d2f_stream.load(path, adapter=adapter, device="cpu") as engine:
            result = await engine.generate(TOKENS[0, :9].tolist(), max_new_tokens=20).result()
            answers.append(list(result.token_ids))
    assert answers[0] == answers[1]


async def test_link_of_the_hubs_cache_is_the_file_that_it_is_called(tmp_path: Path) -> None:
    blob = tmp_path / "8f3ac1"
    write_gguf(blob, "llama", oracle("llama"))
    link = tmp_path / "snapshot" / "tiny.gguf"
    link.parent.mkdir()
    link.symlink_to(blob)
    async with d2f_stream.load(str(link), device="cpu") as engine:
        assert engine.info.name == "tiny.gguf"


async def test_adapter_merges_under_the_published_names(tmp_path: Path) -> None:
    from tiny_checkpoints import FAMILIES, write_adapter

    model = oracle("llama")
    path = write_gguf(tmp_path / "tiny.gguf", "llama", model)
    state = model.state_dict()
    write_adapter(tmp_path / "adapter", FAMILIES["llama"], state)
    found = ours(path, adapter=tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(found, model(TOKENS).logits, atol=TOLERANCE, rtol=0)
