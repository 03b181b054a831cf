"""Mixtures of experts as ONNX graphs: published folders, every quantisation, what cannot be."""

from pathlib import Path
from typing import Any

import pytest

from d2f_export.onnx.artefact import Description, write_artefact
from d2f_export.onnx.quantize import QUANTIZATIONS
from d2f_runtime.backends import open_backend
from d2f_runtime.backends.base import Backend, StepRow
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.decoding.window import Proposals, Window
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_stream.core.errors import UnsupportedModel
from tiny_checkpoints import FAMILIES, added_tokens, oracle, write_adapter, write_checkpoint

pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

PROMPT = tuple(range(40, 56))  # two blocks


def write(folder: Path, model_type: str) -> Path:
    """Write a published checkpoint and an adapter for it."""
    tiny = FAMILIES[model_type]
    theirs = oracle(tiny)
    write_checkpoint(folder / "base", tiny, theirs)
    write_adapter(folder / "adapter", tiny, theirs.state_dict())
    return folder / "base"


def export(folder: Path, quantization: Any, **options: Any) -> Path:
    write_artefact(
        folder / "base",
        folder / quantization,
        Description(name="x", defaults={"cpu": {}}),
        quantization=quantization,
        adapter=folder / "adapter",
        window=24,
        capacity=96,
        **{"target": "cpu", **options},
    )
    return folder / str(quantization)


def answered(backend: Backend, model_type: str) -> Proposals:
    """Answer a window of one and two blocks, over a cache."""
    mask = added_tokens(FAMILIES[model_type])[FAMILIES[model_type].mask or ""]
    slot = backend.open_slot(40)
    size = int(FAMILIES[model_type].attention)
    backend.step([StepRow(slot, Window(0, PROMPT, 16, tuple(range(size, 17, size))))])
    window = Window(16, (mask, 70, *[mask] * 6), 0, tuple(range(16 + size, 25, size)))
    (found,) = backend.step([StepRow(slot, window)])
    backend.close()
    return found


@pytest.mark.parametrize("model_type", ["llada2_moe", "sdar_moe"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_graph_answers_as_the_checkpoint(
    tmp_path: Path, model_type: str, quantization: Any
) -> None:
    base = write(tmp_path, model_type)
    model = load_checkpoint(base, adapter=tmp_path / "adapter")
    wanted = answered(TorchBackend(model, name="x"), model_type)
    folder = export(tmp_path, quantization)
    found = answered(open_backend("onnx", folder, device="cpu", quantization="auto"), model_type)
    # fp32 sums in another order; fewer bits choose other experts now and then, so only the model's
    # plain answer is compared, not its last digit
    tolerance = {"fp32": 1e-5, "fp16": 2e-2}.get(quantization, 1.0)
    assert list(found.confidence) == pytest.approx(list(wanted.confidence), abs=tolerance)
    if quantization in ("fp32", "fp16"):
        assert list(found.tokens) == list(wanted.tokens)
    assert all(0 < c <= 1 for t, c in zip(found.tokens, found.confidence, strict=True) if t >= 0)


def test_graph_of_static_shapes_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "sdar_moe")
    with pytest.raises(UnsupportedModel, match="which a graph of static shapes cannot hold"):
        export(tmp_path, "fp32", target="device")
