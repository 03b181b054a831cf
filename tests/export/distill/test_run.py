"""Whole runs on a tiny model: to a stream of the student, over a kill, out of a full disk."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import d2f_stream
from d2f_export.distill.run import distill
from d2f_export.distill.settings import DistillSettings
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_stream.core.errors import D2FError, InvalidRequest, UnsupportedModel
from tiny_checkpoints import write_model

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft and accelerate of several ages
]

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_model(folder, "llada")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines = [{"prompt": f"Ann has {n}", "answer": f"{n} + 4 = {n + 4}."} for n in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings(base: Path, data: Path, **changes: Any) -> DistillSettings:
    values = {
        "length": 80, "min_answer": 8, "lora_rank": 4, "steps": 6, "accumulation": 2, "lr": 1e-2,
        "save_every": 2, "log_every": 1, "shuffle_buffer": 5,
    }  # fmt: skip
    return DistillSettings(model=str(base), data=(str(data),), **(values | changes))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


async def streamed(model: Path, adapter: Path | None) -> list[int]:
    options: dict[str, Any] = {"backend": "torch", "device": "cpu", "adapter": adapter}
    async with d2f_stream.load(model, **options) as engine:
        session = engine.generate("Ann has 3", max_new_tokens=16, block_size=8)
        return [token async for block in session for token in block.token_ids]


async def test_distilled_adapter_streams_through_the_public_api(
    base: Path, data: Path, tmp_path: Path
) -> None:
    student = distill(
        settings(
            base, data, steps=3, validation=str(data), validate_every=2,
            validation_examples=3, validation_tokens=12, validation_block_size=4,
        ),
        tmp_path / "run",
        cpu=True,
    )  # fmt: skip
    assert await streamed(base, student) != await streamed(base, None)
    losses = rows(student / "log.csv")
    assert [row["step"] for row in losses] == ["1", "2", "3"]
    assert losses[-1]["examples"] == "6"
    assert [row["step"] for row in rows(student / "validation.csv")] == ["2", "3"]
    assert (student / "best" / "adapter_config.json").is_file()
    assert (student / "loss.png").stat().st_size > 1000


async def test_fully_trained_student_is_a_model_of_its_own(
    base: Path, data: Path, tmp_path: Path
) -> None:
    student = distill(settings(base, data, full=True, steps=2), tmp_path / "run", cpu=True)
    assert await streamed(student, None)
    before, after = load_checkpoint(base).state_dict(), load_checkpoint(student).state_dict()
    assert all(not torch.equal(before[n], after[n]) for n in before if "norm" not in n)


KILLED_IN_ITS_SECOND_CHECKPOINT = """
import os, signal, sys
from pathlib import Path
import msgspec
from d2f_export.distill.run import distill
from d2f_export.distill.settings import DistillSettings

def replace(source, target, replace=os.replace):
    if str(target).endswith("step-00000004"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = replace
settings = msgspec.json.decode(sys.argv[1], type=DistillSettings)
distill(settings, Path(sys.argv[2]), cpu=True)
"""


def test_killed_run_goes_on_as_if_nothing_had_been(base: Path, data: Path, tmp_path: Path) -> None:
    chosen = settings(base, data)
    path = os.pathsep.join([str(ROOT), str(ROOT / "runtime"), str(ROOT / "export")])
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_IN_ITS_SECOND_CHECKPOINT,
         msgspec.json.encode(chosen).decode(), str(tmp_path / "killed")],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = {path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert left == {"step-00000002", ".step-00000004"}
    assert len(rows(tmp_path / "killed" / "log.csv")) == 4
    resumed = distill(chosen, tmp_path / "killed", cpu=True)
    whole = distill(chosen, tmp_path / "whole", cpu=True)
    kept = [{k: v for k, v in row.items() if k != "seconds"} for row in rows(whole / "log.csv")]
    again = [{k: v for k, v in row.items() if k != "seconds"} for row in rows(resumed / "log.csv")]
    assert again == kept  # the same losses over the same examples
    assert len(kept) == 6
    left_weights, whole_weights = (
        load_file(folder / "adapter_model.safetensors") for folder in (resumed, whole)
    )
    assert all(torch.equal(left_weights[name], whole_weights[name]) for name in whole_weights)
    assert [p.name for p in (resumed / "checkpoints").iterdir()] == ["step-00000006"]


def test_folder_of_another_run_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    distill(settings(base, data, steps=1), tmp_path / "run", cpu=True)
    with pytest.raises(InvalidRequest, match=r"with block_size 16, not 8; go on"):
        distill(settings(base, data, steps=1, block_size=8), tmp_path / "run", cpu=True)
    with pytest.raises(InvalidRequest, match="holds something else than a training"):
        distill(settings(base, data), data.parent, cpu=True)


def test_folder_of_a_run_that_learnt_nothing_takes_other_settings(
    base: Path, data: Path, tmp_path: Path
) -> None:
    """Where a run was ended before its first checkpoint."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.toml").write_text("block_size = 8\n")
    run = distill(settings(base, data, steps=1), tmp_path / "run", cpu=True)
    assert "block_size = 16" in (run / "settings.toml").read_text()


def test_finished_run_is_not_begun_anew(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, chosen = tmp_path / "run", settings(base, data, steps=2)

    def times() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in run.iterdir()}

    distill(chosen, run, cpu=True)
    before = times()
    again = settings(tmp_path / "gone", data, steps=2)
    with pytest.raises(InvalidRequest, match="holds a training with model"):
        distill(again, run, cpu=True)
    distill(chosen, run, cpu=True, console=Console(width=400))
    assert "finished after 2 steps, the model is there; to go on, raise" in capsys.readouterr().out
    assert times() == before
    distill(settings(base, data, steps=3), run, cpu=True)
    assert [row["step"] for row in rows(run / "log.csv")] == ["1", "2", "3"]
    (run / "adapter_config.json").unlink()
    distill(settings(base, data, steps=3), run, cpu=True)
    assert (run / "adapter_config.json").is_file()  # from the last checkpoint
    assert len(rows(run / "log.csv")) == 3
    shutil.rmtree(run / "checkpoints")  # as one does to save space
    before = times()
    distill(settings(base, data, steps=3), run, cpu=True)
    with pytest.raises(InvalidRequest, match="ended after 3 steps, and no checkpoint that it"):
        distill(settings(base, data, steps=4), run, cpu=True)
    assert times() == before


def test_data_that_changed_under_a_run_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    own = tmp_path / "train.jsonl"
    own.write_text(data.read_text())
    distill(settings(base, own, steps=1), tmp_path / "run", cpu=True)
    with own.open("a") as file:
        file.write('{"prompt": "p", "answer": "a"}\n')
    with pytest.raises(InvalidRequest, match=r"the data has 13 examples, but 12 when .* was begun"):
        distill(settings(base, own, steps=2), tmp_path / "run", cpu=True)


def test_training_stops_where_validation_gains_no_more(
    base: Path, data: Path, tmp_path: Path
) -> None:
    chosen = settings(
        base, data, steps=9, lr=1e-9, validation=str(data), validate_every=1, patience=2,
        validation_examples=1, validation_tokens=4, validation_block_size=4,
    )  # fmt: skip
    student = distill(chosen, tmp_path / "run", cpu=True)
    assert [row["step"] for row in rows(student / "log.csv")] == ["1", "2", "3"]


def test_checkpoint_that_cannot_be_written_leaves_the_one_before(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def full_disk(source: Path, target: Path) -> None:
        if str(target).endswith("step-00000004"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(D2FError, match=r"step-00000004 could not be written: .*No space left"):
        distill(settings(base, data), tmp_path / "run", cpu=True)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert not (tmp_path / "run" / "adapter_config.json").exists()


def test_bad_input_is_refused_before_anything_is_written(
    base: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    write_model(tmp_path / "qwen3", "qwen3")
    with pytest.raises(UnsupportedModel, match="a qwen3 model, but a teacher must see the whole"):
        distill(settings(tmp_path / "qwen3", data), output, cpu=True)
    with pytest.raises(InvalidRequest, match=r"length is 300 but .* holds 256 tokens"):
        distill(settings(base, data, length=300), output, cpu=True)
    with pytest.raises(InvalidRequest, match="attention 'flex' needs a GPU"):
        distill(settings(base, data, attention="flex"), output, cpu=True)
    with pytest.raises(InvalidRequest, match=r"take 3.. tokens, but the model holds 256; lower"):
        distill(settings(base, data, validation=str(data)), output, cpu=True)
    pattern = {"score": "regex", "score_pattern": "####", "validation_tokens": 9}
    with pytest.raises(InvalidRequest, match="validation example 1 does not match score_pattern"):
        distill(settings(base, data, validation=str(data), **pattern), output, cpu=True)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p", "answer": "a"}\n{"prompt": "p"}\n')
    with pytest.raises(InvalidRequest, match=r"bad\.jsonl:2 has no 'answer'"):
        distill(settings(base, tmp_path / "bad.jsonl"), output, cpu=True)
    assert not output.exists()
