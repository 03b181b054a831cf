"""What is particular to the ONNX backend; what all backends share is in tests/conformance."""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import onnxruntime
import pytest

from d2f_runtime.backends.onnx_backend import OnnxBackend, load
from d2f_runtime.manifest import OnnxInfo, read_manifest
from d2f_stream.errors import InvalidParams, ModelDamaged, ModelNotFound, UnsupportedModel
from d2f_stream.params import GenerationParams
from tiny_models import tiny_folder

pytestmark = pytest.mark.torch  # an artefact is made by torch

CPU = {"device": "cpu", "quantization": "auto"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder("dream", "fp32"), tmp_path / "model"))


def change_manifest(folder: Path, **changes: Any) -> None:
    manifest = msgspec.structs.replace(read_manifest(folder), **changes)
    (folder / "manifest.json").write_bytes(msgspec.json.encode(manifest))


def onnx(**changes: Any) -> OnnxInfo:
    return msgspec.structs.replace(OnnxInfo(opset=23, min_onnxruntime="1.23.0"), **changes)


def test_nucleus_sampling_is_refused_before_anything_starts(folder: Path) -> None:
    backend: OnnxBackend = load(folder, **CPU)
    backend.check(GenerationParams(temperature=1.0))
    with pytest.raises(InvalidParams, match=r"top_p is 0\.9 but must be 1 with the onnx backend"):
        backend.check(GenerationParams(top_p=0.9))


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
    with pytest.raises(UnsupportedModel, match=f"device is '{device}' but must be"):
        load(folder, device=device, quantization="auto")


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="has CUDA"
)
def test_cuda_without_its_provider_names_the_extra(folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"no CUDA; install d2f-stream\[edge-gpu\]"):
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
    with pytest.raises(ModelDamaged, match=r"manifest differ in the input 'last_hidden'"):
        load(folder, **CPU)


def test_slots_are_bounded_by_tokens(folder: Path) -> None:
    from d2f_runtime.backends.onnx_session import open_session
    from d2f_stream.errors import OutOfCapacity

    manifest = read_manifest(folder)
    session, device = open_session(folder / "model.onnx", manifest, "auto")
    backend = OnnxBackend(session, manifest, device=device, max_tokens=10)
    slot = backend.open_slot(7)
    with pytest.raises(OutOfCapacity, match="4 tokens: 3 of 10 are free"):
        backend.open_slot(4)
    backend.close_slot(slot)
    backend.open_slot(10)
