"""Draft adapters in step graphs: the rows that go through them are those of the torch backend."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from d2f_export.onnx.artefact import Description, write_artefact
from d2f_export.onnx.command import run_export
from d2f_export.onnx.verify import compare_backends, compare_logits
from d2f_runtime.backends.onnx_backend import OnnxBackend, load
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_runtime.models.manifest import read_manifest
from d2f_stream.core.params import GenerationParams
from tiny_drafts import PRODUCTS, write_draft_adapter
from tiny_models import CONFIGS, NUM_TOKENS, Stored, tiny_folder

pytestmark = pytest.mark.torch

BASE = CONFIGS["llama"]
MASK = 160  # beyond the table
PROMPTS = [[5, 9, 12, 40], [70, 71], list(range(20, 60))]
PARAMS = GenerationParams(
    commit="verify",
    max_new_tokens=24,
    block_size=8,
    confidence_threshold=0.05,
    add_threshold=0.2,
)


def artefact(
    root: Path, quantization: Stored = "fp32", products: Sequence[str] = ()
) -> OnnxBackend:
    write_draft_adapter(root / "adapter", BASE, mask_id=MASK, products=products or tuple(PRODUCTS))
    (root / "tokenizer.json").write_text("{}")
    write_artefact(
        tiny_folder("llama", "torch"),
        root / "artefact",
        Description(name="tiny", tokenizer=root / "tokenizer.json"),
        quantization=quantization,  # type: ignore[arg-type]
        adapter=root / "adapter",
    )
    return load(root / "artefact", device="cpu")


@pytest.mark.parametrize("products", [(), ("o",), ("q", "v", "down"), ("k", "gate")])
@pytest.mark.parametrize("commit", ["verify", "filled"])
def test_logits_of_drafts_and_clean_rows_are_the_models(
    products: tuple[str, ...], commit: str, tmp_path: Path
) -> None:
    candidate = artefact(tmp_path, products=products)
    model = load_checkpoint(tiny_folder("llama", "torch"), adapter=tmp_path / "adapter")
    params = PARAMS.with_overrides({"commit": commit})  # type: ignore[typeddict-item]
    found = compare_logits(model, candidate, PROMPTS, params)
    assert found.max_error < 1e-4
    assert found.top1 == 1.0


def test_steps_and_answers_are_those_of_the_torch_backend(tmp_path: Path) -> None:
    candidate = artefact(tmp_path)
    model = load_checkpoint(tiny_folder("llama", "torch"), adapter=tmp_path / "adapter")
    found = compare_backends(TorchBackend(model, name="torch"), candidate, PROMPTS, PARAMS)
    assert (found.token_agreement, found.same_answers) == (1.0, 1.0)
    assert found.steps[0] == found.steps[1]


@pytest.mark.parametrize("quantization", ["fp16", "int8", "int4", "int4-int8"])
def test_quantised_graphs_draft_too(quantization: Stored, tmp_path: Path) -> None:
    candidate = artefact(tmp_path, quantization)
    model = load_checkpoint(tiny_folder("llama", "torch"), adapter=tmp_path / "adapter")
    found = compare_logits(model, candidate, PROMPTS[:2], PARAMS)
    assert found.top1 > (0.9 if quantization == "fp16" else 0.3)


def test_the_command_writes_defaults_that_verify(tmp_path: Path) -> None:
    write_draft_adapter(tmp_path / "adapter", BASE, mask_id=MASK)
    (tmp_path / "tokenizer.json").write_text("{}")
    arguments = ["--model", str(tiny_folder("llama", "torch")), "--output", str(tmp_path / "out")]
    arguments += ["--adapter", str(tmp_path / "adapter"), "--quantize", "int8"]
    assert run_export([*arguments, "--tokenizer", str(tmp_path / "tokenizer.json")]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.onnx is not None
    assert manifest.onnx.drafts
    assert (manifest.mask_id, manifest.commit_attention) == (MASK, "causal")
    assert (manifest.max_block_size, manifest.num_tokens) == (32, NUM_TOKENS)
    params = manifest.params_for("cpu")
    assert (params.commit, params.block_size) == ("verify", 8)


def test_a_device_graph_drafts_in_its_static_shapes(tmp_path: Path) -> None:
    write_draft_adapter(tmp_path / "adapter", BASE, mask_id=MASK)
    (tmp_path / "tokenizer.json").write_text("{}")
    write_artefact(
        tiny_folder("llama", "torch"),
        tmp_path / "artefact",
        Description(name="tiny", tokenizer=tmp_path / "tokenizer.json"),
        target="device",
        quantization="fp32",
        adapter=tmp_path / "adapter",
        window=40,
        capacity=96,
    )
    candidate = load(tmp_path / "artefact", device="cpu")
    model = load_checkpoint(tiny_folder("llama", "torch"), adapter=tmp_path / "adapter")
    assert compare_logits(model, candidate, PROMPTS, PARAMS).max_error < 1e-4
