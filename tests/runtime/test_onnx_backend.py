"""What is particular to the ONNX backend; what all backends share is in tests/conformance."""

import importlib.metadata
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import onnx as onnx_format
import onnxruntime
import pytest

from d2f_export.onnx.verify import compare_backends
from d2f_runtime.backends.base import StepRow
from d2f_runtime.backends.onnx_backend import OnnxBackend, load
from d2f_runtime.backends.onnx_session import nodes_by_provider, open_sessions
from d2f_runtime.decoding.window import Window
from d2f_runtime.models.manifest import OnnxInfo, encode_manifest, read_manifest
from d2f_stream.core.errors import (
    InvalidParams,
    ModelDamaged,
    ModelNotFound,
    OutOfCapacity,
    UnsupportedModel,
)
from d2f_stream.core.params import GenerationParams
from tiny_models import CONFIGS, NUM_TOKENS, Stored, tiny_folder

pytestmark = pytest.mark.torch  # an artefact is made by torch

CPU = {"device": "cpu", "quantization": "auto"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder("dream", "fp32"), tmp_path / "model"))


def change_manifest(folder: Path, **changes: Any) -> None:
    manifest = replace(read_manifest(folder), **changes)
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))


def onnx(**changes: Any) -> OnnxInfo:
    info = OnnxInfo(opset=23, min_onnxruntime="1.23.0", interface=2)
    return msgspec.structs.replace(info, **changes)


def onnx_of(path: Path) -> Any:
    return onnx_format.load(str(path), load_external_data=False).graph


def test_nucleus_sampling_is_refused_before_anything_starts(folder: Path) -> None:
    backend: OnnxBackend = load(folder, **CPU)
    backend.check(GenerationParams(temperature=1.0))
    with pytest.raises(InvalidParams, match=r"top_p is 0\.9 but must be 1 with the onnx backend"):
        backend.check(GenerationParams(top_p=0.9, temperature=0.5))
    backend.check(GenerationParams(top_p=0.9))  # greedy: the likeliest token is in any nucleus


def test_an_old_onnxruntime_is_told_so(folder: Path) -> None:
    change_manifest(folder, onnx=onnx(min_onnxruntime="99.1"))
    found = onnxruntime.__version__
    with pytest.raises(UnsupportedModel, match=f"needs onnxruntime 99.1 or newer, but {found}"):
        load(folder, **CPU)


def test_versions_are_compared_as_numbers(folder: Path) -> None:
    change_manifest(folder, onnx=onnx(min_onnxruntime="1.9"))
    load(folder, **CPU).close()


def test_a_newer_opset_is_unsupported(folder: Path) -> None:
    change_manifest(folder, onnx=onnx(opset=99))
    with pytest.raises(UnsupportedModel, match="uses opset 99, but this build knows 23"):
        load(folder, **CPU)


def test_quantization_is_what_the_artefact_holds(folder: Path) -> None:
    load(folder, device="cpu", quantization="fp32").close()
    with pytest.raises(UnsupportedModel, match="'int8' but model holds 'fp32'"):
        load(folder, device="cpu", quantization="int8")


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cpu:1"])
def test_unknown_devices_are_named(folder: Path, device: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"device '{device}' is no device of.*auto, cpu"):
        load(folder, device=device, quantization="auto")


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="has CUDA"
)
def test_cuda_without_its_provider_names_the_extra(folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"no CUDA \(pip install 'd2f-stream\[edge-gpu\]'"):
        load(folder, device="cuda", quantization="auto")


def test_cuda_of_an_older_onnxruntime_is_told_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "__version__", "1.30.2")
    with pytest.raises(UnsupportedModel, match=r"onnxruntime-gpu 1\.31 or newer, but 1\.30\.2 is"):
        load(folder, device="cuda", quantization="auto")


def test_missing_files_are_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no manifest\.json in .*nowhere"):
        load(tmp_path / "nowhere", **CPU)
    (folder / "model.onnx").unlink()
    with pytest.raises(ModelDamaged, match=r"no model\.onnx; export it again"):
        load(folder, **CPU)


def test_a_truncated_graph_is_damaged(folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ModelDamaged, match=r"model\.onnx cannot be loaded"):
        load(folder, **CPU)


def test_a_graph_of_another_model_is_damaged(folder: Path) -> None:
    shutil.copyfile(tiny_folder("llada", "fp32") / "model.onnx", folder / "model.onnx")
    with pytest.raises(ModelDamaged, match=r"manifest differ in the input 'keep'"):
        load(folder, **CPU)


def test_slots_are_bounded_by_tokens(folder: Path) -> None:
    manifest = read_manifest(folder)
    backend = OnnxBackend(open_sessions(folder, manifest, "cpu"), manifest, max_tokens=10)
    slot = backend.open_slot(7)
    with pytest.raises(OutOfCapacity, match="4 tokens: 3 of 10 are free"):
        backend.open_slot(4)
    backend.close_slot(slot)
    backend.open_slot(10)


@pytest.mark.parametrize(
    ("interface", "way_out"), [(1, "export it again"), (99, "update d2f-stream")]
)
def test_a_graph_of_another_interface_is_refused(
    folder: Path, interface: int, way_out: str
) -> None:
    change_manifest(folder, onnx=onnx(interface=interface))
    with pytest.raises(UnsupportedModel, match=f"has interface {interface}.*runs 2; {way_out}"):
        load(folder, **CPU)


@pytest.mark.parametrize(
    ("changes", "input_name"), [({"num_kv_heads": 4}, "past.0.k"), ({"hidden_size": 32}, "last_h")]
)
def test_a_manifest_of_another_shape_is_damaged(
    folder: Path, changes: dict[str, int], input_name: str
) -> None:
    shape = msgspec.structs.replace(read_manifest(folder).transformer, **changes)
    change_manifest(folder, transformer=shape)
    with pytest.raises(ModelDamaged, match=f"differ in the size of '{input_name}"):
        load(folder, **CPU)


def test_a_manifest_without_a_graph_is_damaged(folder: Path) -> None:
    change_manifest(folder, onnx=None)
    with pytest.raises(ModelDamaged, match="tells of no ONNX graph"):
        load(folder, **CPU)


def test_both_wheels_at_once_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.31.1")
    with pytest.raises(UnsupportedModel, match=r"pip uninstall -y onnxruntime onnxruntime-gpu"):
        load(folder, **CPU)


def test_the_last_state_of_a_restarted_slot_is_the_new_one(folder: Path) -> None:
    backend = load(folder, **CPU)
    mask = backend.info.mask_id
    found = []
    for first in (10, 60):  # as many tokens are cached both times
        fresh = backend.open_slot(16)
        backend.step([StepRow(fresh, Window(0, tuple(range(first, first + 6)), 6, (6,)))])
        found.append(backend.step([StepRow(fresh, Window(6, (mask,) * 4, 0, (10,)))])[0])
    slot = backend.open_slot(16)
    for first, expected in zip((10, 60), found, strict=True):
        backend.step([StepRow(slot, Window(0, tuple(range(first, first + 6)), 6, (6,)))])
        assert backend.step([StepRow(slot, Window(6, (mask,) * 4, 0, (10,)))])[0] == expected
    backend.close()


@pytest.mark.parametrize("family", CONFIGS)
def test_a_graph_with_static_shapes_answers_like_the_one_without(family: str) -> None:
    device = load(tiny_folder(family, "device"), **CPU)
    assert [s.fixed.width for s in device.sessions if s.fixed is not None] == [24, 96]
    assert device.info.max_len == 96
    graph = onnx_of(tiny_folder(family, "device") / "model.onnx")
    shapes = [d.dim_param for v in graph.input for d in v.type.tensor_type.shape.dim]
    assert set(shapes) == {""}
    size = min(8, device.info.max_block_size)
    params = GenerationParams(confidence_threshold=0.3, block_size=size, max_new_tokens=24)
    rng = random.Random(1)
    # one prompt fits the narrower graph, the other only the wider
    prompts = [[rng.randrange(4, NUM_TOKENS) for _ in range(n)] for n in (7, 40)]
    dynamic = load(tiny_folder(family, "fp32"), **CPU)
    found = compare_backends(dynamic, device, prompts, params)
    assert (found.token_agreement, found.same_answers, found.same_blocks) == (1.0, 1.0, 1.0)
    assert found.max_confidence_error <= 1e-5


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_an_fp16_artefact_keeps_half_the_bytes_and_the_answers(family: str) -> None:
    half, full = load(tiny_folder(family, "fp16"), **CPU), load(tiny_folder(family, "fp32"), **CPU)
    assert half.info.kv_bytes_per_token * 2 == full.info.kv_bytes_per_token
    params = GenerationParams(confidence_threshold=0.3, block_size=8, max_new_tokens=24)
    found = compare_backends(full, half, [[5, 6, 7, 8], [9] * 11], params)
    assert found.token_agreement >= 0.98
    assert found.mean_confidence_error <= 5e-3


def test_int4_for_cuda_leaves_out_what_its_kernels_cannot_multiply() -> None:
    layers = read_manifest(tiny_folder("llada", "int4-fp16")).transformer.num_layers
    for stored, in_full in (("int4", 1), ("int4-fp16", 1 + layers)):  # the head; 96 inputs
        kinds = [n.op_type for n in onnx_of(tiny_folder("llada", stored) / "model.onnx").node]
        assert kinds.count("MatMul") == in_full


@pytest.mark.gpu
@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="needs CUDA"
)
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("stored", ["fp32", "fp16", "int4-fp16"])
def test_a_cuda_device_answers_like_the_cpu(family: str, stored: Stored) -> None:
    cpu = load(tiny_folder(family, stored), device="cpu")
    cuda = load(tiny_folder(family, stored), device="cuda")
    size = min(8, cuda.info.max_block_size)
    params = GenerationParams(confidence_threshold=0.3, block_size=size, max_new_tokens=40)
    found = compare_backends(cpu, cuda, [[5, 6, 7], [9] * 40], params)
    if stored == "fp32":
        assert (found.token_agreement, found.same_answers) == (1.0, 1.0)
        assert found.max_confidence_error <= 1e-4
    assert found.token_agreement >= 0.9
    assert found.mean_confidence_error <= 0.02
    nodes = nodes_by_provider(cuda.sessions[0].session)
    heavy = {"MatMul", "MatMulNBits", "Attention", "RMSNormalization", "RotaryEmbedding", "TopK"}
    assert not heavy & set(nodes.get("CPUExecutionProvider", {}))
