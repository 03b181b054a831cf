"""From a checkpoint to a model folder: whole or absent, described, quantized, compared."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from d2f_export.onnx.artefact import Description, write_artefact
from d2f_export.onnx.graph_builder import GraphBuilder
from d2f_export.onnx.quantize import Linear
from d2f_export.onnx.verify import compare_backends, compare_logits
from d2f_export.onnx.whole_matrices import pack_int4, pack_int8
from d2f_runtime.backends import open_backend
from d2f_runtime.backends.base import Backend
from d2f_runtime.backends.onnx_backend import OnnxBackend
from d2f_runtime.models.checkpoints import save_checkpoint
from d2f_runtime.models.manifest import TrainingInfo, read_manifest, verify_files
from d2f_stream.core.errors import ModelDamaged, ModelNotFound
from d2f_stream.core.params import GenerationParams
from lab.embedded_model.__main__ import main
from tiny_models import CONFIGS, MASK, NUM_TOKENS, Stored, tiny_folder, tiny_model

pytestmark = pytest.mark.torch

PARAMS = GenerationParams(max_new_tokens=24, block_size=8, confidence_threshold=0.3)


def opened(family: str, quantization: Stored) -> Backend:
    folder = tiny_folder(family, quantization)
    name = "torch" if quantization == "torch" else "onnx"
    return open_backend(name, folder, device="cpu", quantization="auto")


def prompts(number: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(4, NUM_TOKENS) for _ in range(5 + 3 * i)] for i in range(number)]


def params_of(family: str) -> GenerationParams:
    return PARAMS.with_overrides({"block_size": min(8, CONFIGS[family].max_block_size)})


def write(folder: Path, tmp_path: Path, **changes: Any) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    description = Description(**{"name": "tiny", "tokenizer": tokenizer, **changes})
    write_artefact(tiny_folder("dream", "torch"), folder, description, quantization="fp32")


@pytest.mark.parametrize("family", CONFIGS)
def test_the_artefact_decodes_like_the_checkpoint(family: str) -> None:
    params = params_of(family)
    found = compare_backends(opened(family, "torch"), opened(family, "fp32"), prompts(3), params)
    assert (found.token_agreement, found.same_answers, found.same_blocks) == (1.0, 1.0, 1.0)
    assert found.max_confidence_error <= 1e-5
    assert found.num_prompts == 3
    assert found.num_proposals >= 72
    assert found.steps[0] == found.steps[1]


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_are_those_of_the_checkpoint(family: str) -> None:
    model, candidate = tiny_model(CONFIGS[family]), opened(family, "fp32")
    assert isinstance(candidate, OnnxBackend)
    found = compare_logits(model, candidate, prompts(2), params_of(family))
    assert found.max_error <= 1e-4
    assert found.top1 == 1.0
    assert found.num_rows >= 48


def test_a_step_that_is_off_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, candidate = tiny_model(CONFIGS["llada"]), opened("llada", "fp32")
    assert isinstance(candidate, OnnxBackend)
    logits, once = candidate.logits, iter([0.01])
    monkeypatch.setattr(candidate, "logits", lambda row: logits(row) + next(once, 0.0))
    found = compare_logits(model, candidate, prompts(1), params_of("llada"), exact=1e-4)
    assert found.max_error == pytest.approx(0.01, abs=1e-4)
    assert found.moved[0] == 0.0
    assert found.moved[1] == pytest.approx(0.01, abs=1e-5)


def test_int8_stays_close() -> None:
    reference, candidate = opened("dream", "torch"), opened("dream", "int8")
    assert candidate.info.quantization == "int8"
    found = compare_backends(reference, candidate, prompts(3), PARAMS)
    # Random weights are the worst case: their logits are flat and decide nothing.
    assert found.token_agreement >= 0.75
    assert found.mean_confidence_error <= 0.05
    assert isinstance(candidate, OnnxBackend)
    logits = compare_logits(tiny_model(CONFIGS["dream"]), candidate, prompts(2), PARAMS)
    assert 1e-4 < logits.max_error < 3.0


def test_different_models_are_not_compared() -> None:
    with pytest.raises(ValueError, match="shift_logits is True in the reference but False"):
        compare_backends(opened("dream", "torch"), opened("llada", "torch"), prompts(1), PARAMS)
    with pytest.raises(ValueError, match="no prompt"):
        compare_backends(opened("dream", "torch"), opened("dream", "torch"), [], PARAMS)


def test_int8_quantizes_every_matrix_whose_products_fit_16_bits() -> None:
    graph = onnx.load(tiny_folder("dream", "int8") / "model.onnx").graph
    weights = [onnx.numpy_helper.to_array(t) for t in graph.initializer]
    matrices = [w for w in weights if w.dtype == "int8" and w.ndim == 2]
    assert len(matrices) == 4 + 5 + 1  # qkv, o, gate and up, down; the last layer's q; the head
    pairs = [np.abs(w[1:].astype(int)) + np.abs(w[:-1].astype(int)) for w in matrices]
    assert all(126 <= pair.max() <= 128 for pair in pairs)
    assert not any(node.op_type == "MatMul" for node in graph.node)


@pytest.mark.parametrize("outlier", [0.0, 30.0])
def test_no_two_products_of_int8_overflow_16_bits(outlier: float) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(3))
    weight[:, 10:12] += outlier
    sizes = np.abs(pack_int8([weight])[0].astype(int))
    assert 255 * (sizes[1:] + sizes[:-1]).max() <= 32767


def test_int8_columns_are_right_to_half_a_level() -> None:
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    levels, scale = pack_int8([weight[:16], weight[16:]])
    assert levels.shape == (24, 40)
    error = np.abs(levels * scale - weight.numpy().T)
    assert (error <= 0.5 * scale + 1e-6).all()


def test_int4_is_what_onnxruntime_multiplies_with() -> None:
    """The packed blocks, unpacked by hand, against the node's own product."""
    num_in, num_out = 80, 16  # the last block is not full
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_out, num_in, generator=generator)
    packed, scales = pack_int4([weight], "float32")
    levels = np.stack([packed & 15, packed >> 4], axis=-1).reshape(num_out, -1)
    unpacked = (levels.astype(np.float32) - 8) * scales.reshape(num_out, -1).repeat(32, axis=1)
    unpacked = unpacked[:, :num_in]
    assert np.abs(unpacked - weight.numpy()).max() <= np.abs(scales).max() * 1.01
    graph = GraphBuilder()
    out = Linear(graph, "int4")("x", "w", ["w"], (num_out, num_in))
    float32 = onnx.TensorProto.FLOAT
    value = onnx.helper.make_tensor_value_info
    model = graph.model([value("x", float32, [None, num_in])], [value(out, float32, None)])
    for tensor, array in zip(model.graph.initializer, (packed, scales), strict=True):
        tensor.raw_data = array.tobytes()
    x = torch.randn(5, num_in, generator=generator).numpy()
    (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    # at accuracy level 4 the activations are rounded to int8
    assert np.abs(found - x @ unpacked.T).max() <= 0.05 * np.abs(x @ unpacked.T).max()


def test_a_batch_of_rows_is_answered_like_each_alone() -> None:
    """Two windows after prefixes of different lengths, the shorter cache padded."""
    session = onnxruntime.InferenceSession(str(tiny_folder("dream", "fp32") / "model.onnx"))
    config, rng = CONFIGS["dream"], np.random.default_rng(0)
    width = config.num_kv_heads * config.head_dim

    def feed(start: int) -> dict[str, Any]:
        tokens = np.array([[5, 6, MASK, MASK]])
        past = {
            f"past.{i}.{x}": rng.normal(size=(1, start, width)).astype(np.float32)
            for i in range(config.num_layers)
            for x in "kv"
        }
        hidden = rng.normal(size=(1, config.hidden_size)).astype(np.float32)
        return {
            "tokens": tokens,
            "start": np.array([start]),
            "visible_until": np.array([[start + 2, start + 2, start + 4, start + 4]]),
            "head_rows": np.array([[0, 3]]),
            "temperature": np.array([0.0 if start > 4 else 0.9], np.float32),
            "uniforms": np.array([[0.3, 0.6]], np.float32),
            "last_hidden": hidden,
            "keep": np.array([1]),
        } | past

    rows = [feed(6), feed(3)]
    joined = {}
    for name in rows[0]:
        parts = [row[name] for row in rows]
        if name.startswith("past."):
            parts = [np.pad(part, ((0, 0), (0, 6 - part.shape[1]), (0, 0))) for part in parts]
        joined[name] = np.concatenate(parts)
    names = ["proposals", "kept", "logits", "new.1.v"]
    full = {"in_full": np.array(True)}
    both = dict(zip(names, session.run(names, joined | full), strict=True))
    for index, row in enumerate(rows):
        alone = dict(zip(names, session.run(names, row | full), strict=True))
        at = slice(index, index + 1)
        assert np.abs(both["proposals"][:, at] - alone["proposals"]).max() <= 1e-5
        for name in names[1:]:
            assert np.abs(both[name][at] - alone[name]).max() <= 1e-5


def test_the_manifest_describes_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "tiny"
    training = TrainingInfo(command="lab.embedded_model student", figures={"accuracy": 0.5})
    defaults = {"cpu": {"block_size": 8, "max_new_tokens": 32, "stop": ["\n"]}}
    write(folder, tmp_path, chat_template="{{ x }}", defaults=defaults, training=training)
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    names = {path.name for path in folder.iterdir()}
    assert names == {"manifest.json", *manifest.files}
    assert set(manifest.files) == {"model.onnx", "tokenizer.json", "chat_template.jinja"}
    assert manifest.params_for("cpu").stop == ("\n",)
    assert manifest.training == training
    assert manifest.num_tokens == NUM_TOKENS
    assert manifest.onnx is not None
    assert (manifest.onnx.opset, manifest.onnx.quantization) == (23, "fp32")
    assert (manifest.onnx.target, manifest.onnx.interface) == ("cpu", 2)
    assert folder.stat().st_mode & 0o777 == 0o755


def test_a_damaged_file_is_found_by_its_hash(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    write(folder, tmp_path)
    path = folder / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelDamaged, match=r"model\.onnx has SHA-256"):
        verify_files(folder, read_manifest(folder))


def test_an_older_artefact_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
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
        write(tmp_path / "tiny", tmp_path, tokenizer=tmp_path / "none.json")
    with pytest.raises(ModelNotFound, match="no model folder at"):
        write_artefact(tmp_path / "none", tmp_path / "tiny", Description(name="x"))
    assert not (tmp_path / "tiny").exists()


def test_manifest_of_a_checkpoint_covers_its_files_and_loads(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tiny_model(CONFIGS["dream"]))
    (tmp_path / "tokenizer.json").write_text("{}")
    command = ["manifest", str(tmp_path), "--name", "tiny", "--description", "It adds."]
    main([*command, "--defaults", '{"cpu": {"block_size": 4}}'])
    manifest = read_manifest(tmp_path)
    assert (manifest.name, manifest.description) == ("tiny", "It adds.")
    assert set(manifest.files) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert manifest.params_for("cpu").block_size == 4
    verify_files(tmp_path, manifest)
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelDamaged, match=r"model\.safetensors"):
        verify_files(tmp_path, manifest)
