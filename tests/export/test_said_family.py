"""Checkpoints whose files do not tell their family: it is said to export, verify and distill."""

import json
from pathlib import Path

import pytest

from d2f_export.distill.base import open_base
from d2f_export.distill.from_ar.base import open_ar_base
from d2f_export.onnx.command import run_export, run_verify
from d2f_runtime.models.manifest import read_manifest
from d2f_stream.core.errors import UnsupportedModel
from tiny_checkpoints import FAMILIES, config_of, write_model

pytest.importorskip("transformers")
pytestmark = pytest.mark.torch


@pytest.fixture
def ambiguous(tmp_path: Path) -> str:
    folder = tmp_path / "base"
    write_model(folder, "stable-diffcoder")
    values = config_of(FAMILIES["stable-diffcoder"], architectures=..., auto_map=...)
    (folder / "config.json").write_text(json.dumps(values))
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"max_new_tokens": 8}))
    return str(folder)


def test_what_is_said_is_exported_and_verified(tmp_path: Path, ambiguous: str) -> None:
    out = tmp_path / "out"
    command = ["--model", ambiguous, "--output", str(out), "--quantize", "fp32"]
    with pytest.raises(UnsupportedModel, match="say which it is"):
        run_export(command)
    assert run_export([*command, "--family", "stable-diffcoder"]) == 0
    assert read_manifest(out).family == "stable-diffcoder"
    command = [str(out), "--model", ambiguous, "--number", "2", "--compared", "1"]
    with pytest.raises(UnsupportedModel, match="say which it is"):
        run_verify(command)
    assert run_verify([*command, "--family", "stable-diffcoder"]) == 0


def test_distillation_refuses_by_the_name_that_is_said(ambiguous: str) -> None:
    with pytest.raises(UnsupportedModel, match="a stable-diffcoder model, but a teacher must see"):
        open_base(ambiguous, family="stable-diffcoder")
    with pytest.raises(UnsupportedModel, match="stable-diffcoder model with grid attention"):
        open_ar_base(ambiguous, family="stable-diffcoder")
    assert open_ar_base(ambiguous, family="llama").config.family == "llama"
