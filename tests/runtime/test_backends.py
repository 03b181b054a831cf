import importlib.util
from pathlib import Path

import pytest

from d2f_runtime.backends import BACKENDS, choose_backend, open_backend
from d2f_stream.core.errors import MissingExtra, ModelNotFound, UnsupportedModel


@pytest.fixture
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def folder_with(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).touch()
    return folder


@pytest.mark.usefixtures("everything_installed")
@pytest.mark.parametrize(
    ("files", "device", "name"),
    [
        (["model.onnx"], "auto", "onnx"),
        (["model.onnx"], "cuda", "onnx"),
        (["model-00001-of-00002.safetensors"], "cpu", "torch"),
        (["model.onnx", "model.safetensors"], "auto", "onnx"),
        (["model.onnx", "model.safetensors"], "cuda:1", "torch"),
        (["script.json"], "auto", "scripted"),
    ],
)
def test_auto_follows_the_files_and_the_device(
    tmp_path: Path, files: list[str], device: str, name: str
) -> None:
    assert choose_backend(folder_with(tmp_path, *files), device=device) == name


@pytest.mark.usefixtures("nothing_installed")
def test_auto_names_a_backend_that_is_not_installed_rather_than_none(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "model.onnx")
    assert choose_backend(folder) == "onnx"
    with pytest.raises(MissingExtra, match=r"backend 'onnx' needs onnxruntime.*\[edge\]"):
        open_backend("onnx", folder, device="cpu", quantization="auto")


def test_auto_prefers_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "torch" else None)
    assert choose_backend(folder_with(tmp_path, "model.onnx", "model.safetensors")) == "torch"


def test_named_backend_is_taken_whatever_the_files(tmp_path: Path) -> None:
    assert choose_backend(tmp_path, "torch") == "torch"
    with pytest.raises(UnsupportedModel, match="'jax'"):
        choose_backend(tmp_path, "jax")


def test_folder_that_no_backend_runs_says_what_one_would(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"\*\.onnx, \*\.safetensors"):
        choose_backend(folder_with(tmp_path, "README.md"))
    with pytest.raises(ModelNotFound, match="no model at"):
        choose_backend(tmp_path / "nowhere")


def test_scripted_backend_needs_nothing(tmp_path: Path) -> None:
    (tmp_path / "script.json").write_text('{"answers": "abc"}')
    backend = open_backend("scripted", tmp_path, device="auto", quantization="auto")
    assert backend.info.family == "scripted"
    assert BACKENDS["scripted"].installed
