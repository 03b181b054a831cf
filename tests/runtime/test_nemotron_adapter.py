"""Nemotron-Labs-Diffusion's own draft adapter, linear_spec: only drafts go through it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import d2f_stream
from d2f_runtime.backends import open_backend
from d2f_runtime.backends.base import StepRow
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.decoding.window import Window
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_stream.core.errors import UnsupportedModel
from tiny_checkpoints import (
    oracle,
    write_checkpoint,
    write_model,
)
from tiny_nemotron import KIND, MASK, PROMPT, SIZE, TINY, answered, forward, replace_params

pytest.importorskip("transformers")
pytestmark = pytest.mark.torch


def write_linear_spec(folder: Path, *, num_layers: int = 2, scale: float = 4.0) -> Path:
    """Write the adapter that is published beside the weights: o_proj alone, of rank 4."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(9)
    weights: dict[str, Tensor] = {}
    for layer in range(num_layers):
        stem = f"base_model.model.encoder.layers.{layer}.self_attn.o_proj.lora_"
        weights[f"{stem}A.weight"] = torch.randn(4, 128, generator=generator) * 0.2
        weights[f"{stem}B.weight"] = torch.randn(64, 4, generator=generator) * 0.2
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "base_model_name_or_path": "nvidia/Nemotron-Labs-Diffusion-8B", "bias": "none",
        "lora_alpha": 4 * scale, "peft_type": "LORA", "r": 4, "target_modules": ["o_proj"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


async def test_drafts_through_the_adapter_leave_the_answer(tmp_path: Path) -> None:
    write_model(tmp_path / "base", KIND, seed=2)
    adapter = write_linear_spec(tmp_path / "linear_spec_lora")
    async with d2f_stream.load(tmp_path / "base", device="cpu") as engine:
        wanted = await engine.generate(PROMPT, max_new_tokens=30, block_size=1).result()
    async with d2f_stream.load(tmp_path / "base", adapter=adapter, device="cpu") as engine:
        assert engine.defaults.commit == "verify"
        assert engine.defaults.block_size == SIZE
        for block_size in (SIZE, 4, 1):
            found = await engine.generate(PROMPT, max_new_tokens=30, block_size=block_size).result()
            assert found.token_ids == wanted.token_ids
            assert found.usage.steps <= wanted.usage.steps


@torch.no_grad()
def test_only_drafts_go_through_the_adapter(tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 1}  # of one layer K/V do not depend on the output projection
    theirs = oracle(TINY, seed=5, **changes)
    write_checkpoint(tmp_path / "base", TINY, theirs, **changes)
    adapter = write_linear_spec(tmp_path / "linear_spec_lora", num_layers=1)
    model = load_checkpoint(tmp_path / "base", adapter=adapter)
    plain = forward(theirs, [*PROMPT, *[MASK] * SIZE], len(PROMPT)).softmax(-1).max(-1)
    weights = load_file(adapter / "adapter_model.safetensors")
    down, up = (weights[next(name for name in weights if f"lora_{x}" in name)] for x in "AB")
    theirs.model.layers[0].self_attn.o_proj.weight += 4.0 * up @ down
    drafted = forward(theirs, [*PROMPT, *[MASK] * SIZE], len(PROMPT)).softmax(-1).max(-1)
    window = Window(
        0, (*PROMPT, *[MASK] * SIZE), len(PROMPT), (*range(1, len(PROMPT) + 1), len(PROMPT) + SIZE)
    )
    for runner in ("plain", "fast"):
        backend = TorchBackend(model, name="x", runner=runner)
        slot = backend.open_slot(40)
        (found,) = backend.step([StepRow(slot, window)])
        first, rest = found.confidence[len(PROMPT)], found.confidence[len(PROMPT) + 1 :]
        assert first == pytest.approx(float(plain.values[len(PROMPT) - 1]), abs=1e-5)
        assert list(rest) == pytest.approx(drafted.values[len(PROMPT) + 1 :].tolist(), abs=1e-5)
        assert list(found.tokens[-3:]) == drafted.indices[-3:].tolist()
        backend.close()
    changed = (plain.values - drafted.values)[-SIZE:].abs().max()
    assert changed > 1e-3  # a hundred times the tolerance


def test_graph_holds_the_adapter_beside_the_base(tmp_path: Path) -> None:
    from d2f_export.onnx.artefact import Description, write_artefact

    write_model(tmp_path / "base", KIND, seed=2)
    adapter = write_linear_spec(tmp_path / "linear_spec_lora")
    write_artefact(
        tmp_path / "base", tmp_path / "onnx", Description(name="x", defaults={"cpu": {}}),
        target="cpu", quantization="fp32", adapter=adapter, window=24, capacity=96,
    )  # fmt: skip
    params = replace_params(
        {"max_new_tokens": 21, "block_size": SIZE, "commit": "verify", "sub_block_size": 0}
    )
    model = load_checkpoint(tmp_path / "base", adapter=adapter)
    wanted, sure = answered(TorchBackend(model, name="x"), params)
    onnx = open_backend("onnx", tmp_path / "onnx", device="cpu", quantization="auto")
    tokens, confidence = answered(onnx, params)
    assert tokens == wanted
    assert confidence == pytest.approx(sure, abs=1e-5)


def test_adapter_of_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "llama", "llama")
    adapter = write_linear_spec(tmp_path / "linear_spec_lora")
    with pytest.raises(UnsupportedModel, match="another model than this llama: for one that draft"):
        load_checkpoint(tmp_path / "llama", adapter=adapter)
