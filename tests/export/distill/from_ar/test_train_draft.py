"""Whole trainings on a tiny Llama: to an adapter that the runtime drafts with, and over a stop."""

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from d2f_export.distill.from_ar.base import free_mask_id, open_ar_base
from d2f_export.distill.from_ar.run import train_draft
from d2f_export.distill.from_ar.settings import DraftSettings
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_stream.core.errors import (
    D2FError,
    InvalidParams,
    InvalidRequest,
    ModelDamaged,
    UnsupportedModel,
)
from tiny_checkpoints import write_model

pytest.importorskip("transformers")
pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_model(folder, "qwen2")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines = [
        {"prompt": f"Ann has {n}", "answer": f"{n} + 4 = {n + 4}. So she has {n + 4} apples now."}
        for n in range(24)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings(base: Path, data: Path, **changes: Any) -> DraftSettings:
    values: dict[str, Any] = {
        "from_ar": str(base), "data": (str(data),), "rank": 4, "rows": 2, "clean_length": 128,
        "noisy_length": 128, "steps": 6, "lr": 1e-2, "warmup": 2, "block_sizes": (2, 4),
        "curriculum": 4, "log_every": 1, "save_every": 2, "decay": 0.0,
    }  # fmt: skip
    return DraftSettings(**(values | changes))


def logged(folder: Path) -> list[dict[str, float]]:
    with (folder / "log.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def test_training_ends_in_an_adapter_that_the_runtime_drafts_with(
    base: Path, data: Path, tmp_path: Path
) -> None:
    folder = train_draft(settings(base, data, steps=40, decay=0.3), tmp_path / "run", cpu=True)
    rows = logged(folder)
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[-1]["skipped"] == 0
    assert rows[-1]["tokens"] == 40 * 2 * 128
    assert rows[-1]["lr"] < rows[20]["lr"]
    assert all(row["norm"] > 0 for row in rows)
    model = load_checkpoint(base, adapter=folder)
    assert model.draft is not None
    about = json.loads((folder / "adapter_config.json").read_text())["d2f"]
    assert about["mask_id"] == free_mask_id(open_ar_base(str(base)))
    assert about["block_sizes"] == [2, 4]
    assert len(about["base"]["sha256"]) == 64
    plain = load_checkpoint(base)
    assert all(
        torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items()
    )


def test_a_run_that_stopped_ends_as_one_that_did_not(
    base: Path, data: Path, tmp_path: Path
) -> None:
    whole = train_draft(settings(base, data), tmp_path / "whole", cpu=True)
    train_draft(settings(base, data, steps=3), tmp_path / "parts", cpu=True)
    moved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "parts", moved)
    parts = train_draft(settings(base, data), moved, cpu=True)
    expected = load_file(whole / "adapter_model.safetensors")
    found = load_file(parts / "adapter_model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_stop_while_a_checkpoint_is_written_leaves_the_one_before(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train_draft(settings(base, data, steps=2), tmp_path / "run", cpu=True)
    file = folder / "checkpoints" / "step-00000002" / "draft.safetensors"
    before = file.read_bytes()

    def fails(content: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("d2f_export.distill.from_ar.draft_training.save_file", fails)
    with pytest.raises(D2FError, match=r"step-00000004 could not be written: .*No space left"):
        train_draft(settings(base, data, steps=4), folder, cpu=True)
    assert file.read_bytes() == before
    assert os.listdir(folder / "checkpoints") == ["step-00000002"]
    monkeypatch.undo()
    train_draft(settings(base, data, steps=4), folder, cpu=True)


def test_an_adapter_that_cannot_be_written_is_told(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("d2f_export.distill.from_ar.draft_training.write_adapter", fails)
    with pytest.raises(D2FError, match=r"model could not be written into .*No space left"):
        train_draft(settings(base, data, steps=2), tmp_path / "run", cpu=True)
    monkeypatch.undo()
    folder = train_draft(settings(base, data, steps=2), tmp_path / "run", cpu=True)
    assert (folder / "adapter_config.json").is_file()
    assert [row["step"] for row in logged(folder)] == [1, 2]


def test_damaged_checkpoint_is_named(base: Path, data: Path, tmp_path: Path) -> None:
    folder = train_draft(settings(base, data, steps=1), tmp_path / "run", cpu=True)
    (folder / "checkpoints" / "step-00000001" / "draft.safetensors").write_bytes(b"half")
    with pytest.raises(ModelDamaged, match=r"step-00000001 cannot be read"):
        train_draft(settings(base, data, steps=2), folder, cpu=True)


def test_a_checkpoint_of_an_earlier_version_is_refused(
    base: Path, data: Path, tmp_path: Path
) -> None:
    folder = train_draft(settings(base, data, steps=1), tmp_path / "run", cpu=True)
    shutil.rmtree(folder / "checkpoints")
    (folder / "finished.json").unlink()
    (folder / "checkpoint.pt").write_bytes(b"")
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    with pytest.raises(InvalidRequest, match=r"earlier version \(checkpoint\.pt\), .*from_adapter"):
        train_draft(settings(base, data, steps=2), folder, cpu=True)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_each_start_has_a_time_of_its_own(base: Path, data: Path, tmp_path: Path) -> None:
    chosen = settings(base, data, steps=3, max_seconds=1e-9)  # over after a step
    for steps in ([1], [1, 2], [1, 2, 3]):
        folder = train_draft(chosen, tmp_path / "run", cpu=True)
        assert [row["step"] for row in logged(folder)] == steps
    before = (folder / "adapter_model.safetensors").stat().st_mtime_ns
    train_draft(chosen, folder, cpu=True)  # there are no more steps
    assert (folder / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from d2f_export.distill.from_ar.training import Training

    whole = Training.loss

    def loss(self: Training, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        found = whole(self, batch)
        return found * float("nan") if batch["clean"].sum() % 2 else found

    monkeypatch.setattr(Training, "loss", loss)
    folder = train_draft(settings(base, data, steps=12), tmp_path / "run", cpu=True)
    assert 0 < logged(folder)[-1]["skipped"] < 12
    stored = load_file(folder / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in stored.values())


def test_other_settings_are_refused_and_more_data_is_not(
    base: Path, data: Path, tmp_path: Path
) -> None:
    folder = train_draft(settings(base, data, steps=1), tmp_path / "run", cpu=True)
    with pytest.raises(InvalidRequest, match="holds a training with rank 4, not 8"):
        train_draft(settings(base, data, rank=8), folder, cpu=True)
    more = msgspec.structs.replace(settings(base, data, steps=2), data=(str(data), str(data)))
    train_draft(more, folder, cpu=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("text")
    with pytest.raises(InvalidRequest, match="holds something else than a training"):
        train_draft(settings(base, data), tmp_path / "full", cpu=True)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": "a"}', "has no 'answer'"),
        ('{"prompt": "a", "answer": " "}', "has an empty 'answer'"),
        ("", "there is no example in"),
    ],
)
def test_data_without_answers_is_refused(base: Path, tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "d.jsonl").write_text(line)
    with pytest.raises(InvalidRequest, match=told):
        train_draft(settings(base, tmp_path / "d.jsonl"), tmp_path / "run", cpu=True)
    assert not (tmp_path / "run").exists()


def test_examples_that_fit_nowhere_are_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "a", "answer": "no " * 400}))
    with pytest.raises(InvalidRequest, match="none of the 1 examples fits into clean_length"):
        train_draft(settings(base, tmp_path / "d.jsonl"), tmp_path / "run", cpu=True)


def test_memory_that_does_not_do_is_told_before_the_start(
    base: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match=r"needs [\d.]+ GiB but the device has .* lower rows"):
        train_draft(settings(base, data, rows=1 << 20), tmp_path / "run", cpu=True)
    assert not (tmp_path / "run").exists()


def test_a_base_that_sees_ahead_is_refused(data: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "llada", "llada")
    with pytest.raises(UnsupportedModel, match="--from-ar takes an autoregressive one"):
        train_draft(settings(tmp_path / "llada", data), tmp_path / "run", cpu=True)


def test_a_mask_that_ends_answers_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    end = open_ar_base(str(base)).config.eos_ids[0]
    with pytest.raises(InvalidRequest, match="that id ends the answers"):
        train_draft(settings(base, data, mask_id=end), tmp_path / "run", cpu=True)


def test_sizes_that_fall_are_refused(base: Path, data: Path) -> None:
    with pytest.raises(InvalidParams, match=r"block_sizes is .* must be rising"):
        settings(base, data, block_sizes=(8, 4))


def test_a_training_begins_with_an_adapter_and_refuses_one_that_does_not_fit(
    base: Path, data: Path, tmp_path: Path
) -> None:
    first = train_draft(settings(base, data, steps=30), tmp_path / "first", cpu=True)
    begun = {"from_adapter": str(first), "steps": 2, "lr": 1e-6}
    second = train_draft(settings(base, data, **begun), tmp_path / "second", cpu=True)
    expected = load_file(first / "adapter_model.safetensors")
    found = load_file(second / "adapter_model.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(found[name].float(), value.float(), rtol=1e-2, atol=1e-3)
    for name, value, message in (
        ("rank", 8, r"rank is 8, but .*first has 4"),
        ("mask_id", 3, r"mask_id is 3, but .*first has "),
        ("from_adapter", str(base), r"holds no draft adapter"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            train_draft(settings(base, data, **(begun | {name: value})), tmp_path / "x", cpu=True)
    config = json.loads((first / "adapter_config.json").read_text())
    config["d2f"]["base"]["sha256"] = "0" * 64
    (first / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidRequest, match="give the base that it was made of"):
        train_draft(settings(base, data, **begun), tmp_path / "x", cpu=True)
    assert not (tmp_path / "x").exists()


def test_a_trimmed_adapter_is_trained_on_and_stays_trimmed(
    base: Path, data: Path, tmp_path: Path
) -> None:
    first = train_draft(settings(base, data, steps=8), tmp_path / "first", cpu=True)
    trimmed = tmp_path / "trimmed"
    trimmed.mkdir()
    narrow = "layers.0.self_attn.k_proj"
    before = load_file(first / "adapter_model.safetensors")
    for name, value in before.items():
        if narrow in name:
            before[name] = (value[:2] if "lora_A" in name else value[:, :2]).contiguous()
    save_file(before, trimmed / "adapter_model.safetensors")
    config = json.loads((first / "adapter_config.json").read_text())
    wide = [
        name.removeprefix("base_model.model.model.").removesuffix(".lora_A.weight")
        for name in before
        if "lora_A" in name and narrow not in name
    ]
    config |= {"r": 2, "lora_alpha": 2, "rank_pattern": dict.fromkeys(wide, 4)}
    config["alpha_pattern"] = config["rank_pattern"]
    (trimmed / "adapter_config.json").write_text(json.dumps(config))
    begun = {"from_adapter": str(trimmed), "steps": 4}
    second = train_draft(settings(base, data, **begun), tmp_path / "second", cpu=True)
    after = load_file(second / "adapter_model.safetensors")
    for name, value in before.items():
        if narrow in name:
            rest = after[name][2:] if "lora_A" in name else after[name][:, 2:]
            assert (rest == 0).all()
        elif "lora_" in name:
            assert (after[name] != value).any()
