"""From a checkpoint to a model folder: whole or absent, described, quantized, compared."""

import json
import random
from pathlib import Path

import onnx
import pytest

from d2f_export import artefact
from d2f_export.__main__ import main
from d2f_export.artefact import write_artefact, write_checkpoint_manifest
from d2f_export.quantize import quantize_int8
from d2f_export.verify import compare_backends
from d2f_runtime.backends import open_backend
from d2f_runtime.backends.base import Backend
from d2f_runtime.manifest import TrainingInfo, read_manifest, verify_files
from d2f_runtime.models.checkpoints import save_checkpoint
from d2f_stream.errors import ModelDamaged, ModelNotFound
from d2f_stream.params import GenerationParams
from tiny_models import CONFIGS, NUM_TOKENS, Stored, tiny_folder, tiny_model

pytestmark = pytest.mark.torch

PARAMS = GenerationParams(max_new_tokens=24, block_size=8, confidence_threshold=0.3)


def opened(family: str, quantization: Stored) -> Backend:
    folder = tiny_folder(family, quantization)
    name = "torch" if quantization == "torch" else "onnx"
    return open_backend(name, folder, device="cpu", quantization="auto")


def prompts(number: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(4, NUM_TOKENS) for _ in range(5 + 3 * i)] for i in range(number)]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the export by a copy of a graph made before."""
    graph = tiny_folder("dream", "fp32") / "model.onnx"
    monkeypatch.setattr(
        artefact, "export_graph", lambda model, path: path.write_bytes(graph.read_bytes())
    )


def write(folder: Path, tmp_path: Path, **changes: object) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    arguments: dict[str, object] = {
        "name": "tiny",
        "tokenizer_path": tokenizer,
        "quantization": "fp32",
    }
    write_artefact(tiny_folder("dream", "torch"), folder, **(arguments | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llada", "dream", "sdar"])
def test_the_artefact_decodes_like_the_checkpoint(family: str) -> None:
    found = compare_backends(opened(family, "torch"), opened(family, "fp32"), prompts(3), PARAMS)
    assert (found.token_agreement, found.same_answers) == (1.0, 1.0)
    assert found.max_confidence_error <= 1e-5
    assert found.num_prompts == 3
    assert found.num_proposals > 100
    assert found.steps[0] == found.steps[1]


def test_an_autoregressive_artefact_decodes_like_its_checkpoint() -> None:
    params = PARAMS.with_overrides({"block_size": 1, "max_active_blocks": 1})
    found = compare_backends(opened("llama", "torch"), opened("llama", "fp32"), prompts(2), params)
    assert (found.token_agreement, found.same_answers) == (1.0, 1.0)


def test_int8_stays_close() -> None:
    reference, candidate = opened("dream", "torch"), opened("dream", "int8")
    assert candidate.info.quantization == "int8"
    found = compare_backends(reference, candidate, prompts(3), PARAMS)
    # Random weights are the worst case: their logits are flat and decide nothing.
    assert found.token_agreement >= 0.75
    assert found.mean_confidence_error <= 0.05


def test_different_models_are_not_compared() -> None:
    with pytest.raises(ValueError, match="shift_logits is True in the reference but False"):
        compare_backends(opened("dream", "torch"), opened("llada", "torch"), prompts(1), PARAMS)
    with pytest.raises(ValueError, match="no prompt"):
        compare_backends(opened("dream", "torch"), opened("dream", "torch"), [], PARAMS)


def test_int8_quantizes_every_matrix_and_keeps_seven_bits() -> None:
    graph = onnx.load(tiny_folder("dream", "int8") / "model.onnx").graph
    weights = [onnx.numpy_helper.to_array(t) for t in graph.initializer]
    matrices = [w for w in weights if w.dtype == "int8" and w.ndim == 2]
    assert len(matrices) == 5 + 6 + 1  # qkv, o, gate, up, down; the last layer's q apart; the head
    assert all(abs(w).max() <= 64 for w in matrices)
    assert not any(node.op_type == "MatMul" for node in graph.node)


def test_a_graph_is_not_quantized_onto_itself(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="onto itself"):
        quantize_int8(tmp_path / "a.onnx", tmp_path / "a.onnx")


def test_the_manifest_describes_the_folder(quick: None, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "tiny"
    training = TrainingInfo(command="python -m d2f_export student", figures={"accuracy": 0.5})
    defaults = {"cpu": {"block_size": 8, "max_new_tokens": 32, "stop": ["\n"]}}
    write(folder, tmp_path, chat_template="{{ x }}", defaults=defaults, training=training)
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    names = {path.name for path in folder.iterdir()}
    assert names == {"manifest.json", *manifest.files}
    assert set(manifest.files) == {"model.onnx", "tokenizer.json", "chat_template.jinja"}
    assert manifest.params_for("cpu").stop == ("\n",)
    assert manifest.training == training
    assert manifest.vocab_size == NUM_TOKENS
    assert manifest.onnx is not None
    assert (manifest.onnx.opset, manifest.onnx.quantization) == (23, "fp32")
    assert folder.stat().st_mode & 0o777 == 0o755


def test_a_damaged_file_is_found_by_its_hash(quick: None, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    write(folder, tmp_path)
    path = folder / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelDamaged, match=r"model\.onnx has SHA-256"):
        verify_files(folder, read_manifest(folder))


def test_an_export_that_fails_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(model: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(artefact, "export_graph", fail)
    with pytest.raises(RuntimeError, match="disk is full"):
        write(tmp_path / "out" / "tiny", tmp_path)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_older_artefact_is_replaced_only_by_a_whole_one(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "out" / "tiny"
    write(folder, tmp_path, name="first")
    write(folder, tmp_path, name="second", chat_template="{{ x }}")
    assert read_manifest(folder).name == "second"
    with pytest.raises(ModelDamaged, match="cpu defaults of model third"):
        write(folder, tmp_path, name="third", defaults={"cpu": {"block_size": 0}})
    assert read_manifest(folder).name == "second"
    assert list((tmp_path / "out").iterdir()) == [folder]


def test_missing_inputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no tokenizer at"):
        write(tmp_path / "tiny", tmp_path, tokenizer_path=tmp_path / "none.json")
    with pytest.raises(ModelNotFound, match="no model folder at"):
        write_artefact(
            tmp_path / "none", tmp_path / "tiny", name="x", tokenizer_path=tmp_path / "t.json"
        )
    assert not (tmp_path / "tiny").exists()


def test_manifest_of_a_checkpoint_covers_its_files_and_loads(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tiny_model(CONFIGS["dream"]))
    (tmp_path / "tokenizer.json").write_text("{}")
    write_checkpoint_manifest(tmp_path, name="tiny", defaults={"cpu": {"block_size": 4}})
    manifest = read_manifest(tmp_path)
    assert set(manifest.files) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert manifest.params_for("cpu").block_size == 4
    verify_files(tmp_path, manifest)
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelDamaged, match=r"model\.safetensors"):
        verify_files(tmp_path, manifest)


def test_verify_command_reports_agreement_with_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).parents[2]
    arguments = [str(root / "runtime/d2f_runtime/models/embedded"), "--problems", "3"]
    checkpoint = str(root / "export/checkpoints/word-problems")
    output = tmp_path / "report.json"
    main(["verify", *arguments, "--checkpoint", checkpoint, "--output", str(output)])
    report = json.loads(output.read_text())
    assert report == json.loads(capsys.readouterr().out)
    assert report["num_prompts"] == 3
    assert report["token_agreement"] > 0.98
