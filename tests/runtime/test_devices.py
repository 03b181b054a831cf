"""A device that there is not: one error for every backend, which lists what there is."""

import json
from pathlib import Path

import pytest

import d2f_stream
from d2f_runtime.backends import devices
from d2f_runtime.backends.devices import check_device, devices_of
from d2f_stream.core.errors import UnsupportedModel


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    there = ["cpu", "cuda", "cuda:0", "cuda:1"]
    monkeypatch.setattr(devices, "devices_of", lambda backend: there)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "devices_of", lambda backend: ["cpu"])


@pytest.mark.parametrize("backend", ["auto", "torch", "onnx", "scripted"])
@pytest.mark.parametrize("device", ["mps", "gpu", "cpu:1", "cuda:", "cuda:x", "CUDA", "", "xpu:0"])
@pytest.mark.usefixtures("no_gpu")
def test_unknown_name_lists_what_there_is(backend: str, device: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        check_device(device, backend=backend)
    told = f"device {device!r} is no device of d2f_stream, which runs on CPUs and on NVIDIA's GPUs"
    assert str(caught.value) == f"{told} by CUDA; here there is: auto, cpu"


@pytest.mark.parametrize("backend", ["auto", "torch", "onnx", "scripted"])
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
@pytest.mark.usefixtures("no_gpu")
def test_cuda_that_is_not_there_says_why(backend: str, device: str) -> None:
    with pytest.raises(UnsupportedModel, match=rf"'{device}' is not to be had, since .*auto, cpu$"):
        check_device(device, backend=backend)


@pytest.mark.usefixtures("two_gpus")
def test_gpu_beyond_the_last_is_more_than_there_is() -> None:
    for device in ("auto", "cpu", "cuda", "cuda:1"):
        check_device(device, backend="torch")
    with pytest.raises(UnsupportedModel, match=r"more than this .*cpu, cuda, cuda:0, cuda:1$"):
        check_device("cuda:2", backend="torch")


@pytest.mark.parametrize("backend", ["torch", "onnx", "scripted"])
def test_every_backend_has_a_cpu(backend: str) -> None:
    assert devices_of(backend)[0] == "cpu"


@pytest.mark.parametrize("backend", ["auto", "onnx", "scripted"])
async def test_model_is_not_opened_on_a_device_that_there_is_not(
    backend: str, tmp_path: Path
) -> None:
    folder = None
    if backend == "scripted":
        folder = tmp_path
        (tmp_path / "script.json").write_text(json.dumps({"answers": "hello"}))
    with pytest.raises(UnsupportedModel, match=r"device 'mps'.*here there is: auto, cpu"):
        async with d2f_stream.load(folder, backend=backend, device="mps"):
            pass
