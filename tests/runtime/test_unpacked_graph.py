"""Packed graphs opened matrix by matrix: the same bits, and nothing left for onnxruntime to unpack.

The oracle is onnxruntime, which opens the same file alone.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import d2f_export.onnx.artefact as artefact
from d2f_runtime.backends.onnx_backend import load
from d2f_runtime.backends.protobuf import fields_of
from d2f_runtime.backends.unpacked_graph import open_unpacked
from d2f_stream.core.errors import ModelDamaged
from tiny_packed import write_packed

pytestmark = pytest.mark.torch

CPU = ["CPUExecutionProvider"]


@pytest.fixture(scope="module", params=["in the graph", "in a file"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "in a file":
            patch.setattr(artefact, "INLINE_BYTES", 0)
        written = write_packed(root)
    assert (written / "model.onnx.data").exists() == (request.param == "in a file")
    return written


def inputs(session: ort.InferenceSession, window: int) -> dict[str, Any]:
    """Return random inputs of a step with nothing cached."""
    draws = np.random.default_rng(window)
    sizes = {"batch": 1, "window": window, "past": 0, "rows": window}
    found: dict[str, Any] = {}
    for value in session.get_inputs():
        shape = [sizes.get(size, size) for size in value.shape]
        kinds = {"tensor(int64)": np.int64, "tensor(bool)": np.bool_}
        found[value.name] = np.zeros(shape, kinds.get(value.type, np.float32))
    found["tokens"] = draws.integers(4, 150, (1, window))
    found["visible_until"] = np.arange(1, window + 1)[None]
    found["head_rows"] = np.arange(window)[None]
    found["is_draft"] = draws.random((1, window)) < 0.5
    return found


@pytest.mark.parametrize("window", [1, 5])
def test_answers_are_those_of_the_file_to_the_bit(folder: Path, window: int) -> None:
    path = folder / "model.onnx"
    sessions = [
        ort.InferenceSession(str(path), providers=CPU),
        open_unpacked(path, ort.SessionOptions(), CPU, in_blocks=False),
    ]
    expected, found = (session.run(None, inputs(session, window)) for session in sessions)
    assert [array.tobytes() for array in found] == [array.tobytes() for array in expected]


@pytest.mark.parametrize("in_blocks", [False, True])
def test_onnxruntime_is_left_nothing_to_unpack(
    folder: Path, tmp_path: Path, in_blocks: bool
) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.optimized_model_filepath = str(tmp_path / "opened.onnx")
    open_unpacked(folder / "model.onnx", options, CPU, in_blocks=in_blocks)
    opened = onnx.load(tmp_path / "opened.onnx", load_external_data=False).graph
    kinds = {node.op_type for node in opened.node}
    assert ("MatMulNBits" in kinds, "MatMulIntegerToFloat" in kinds) == (in_blocks, not in_blocks)
    assert not {"BitwiseAnd", "BitShift", "Pad"} & kinds


def test_a_message_is_its_fields(folder: Path) -> None:
    data = (folder / "model.onnx").read_bytes()
    found = list(fields_of(memoryview(data)))
    assert b"".join(field.whole for field in found) == data
    names = [str(field.value, "utf-8") for field in found if field.key == 2]
    assert names == ["d2f-stream"]


@pytest.mark.parametrize("kept", [0, 1, 10, 1000, -1])
def test_a_file_that_is_cut_off_is_damaged(folder: Path, tmp_path: Path, kept: int) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    graph = tmp_path / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:kept])
    with pytest.raises(ModelDamaged, match=r"model\.onnx"):
        load(tmp_path, device="cpu")


@pytest.mark.parametrize("data", [b"\x0f", b"\xff" * 11, b"\x0a\x05abc", b"\x0d\x00", b"\x80"])
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="message"):
        list(fields_of(memoryview(data)))
