import json
from pathlib import Path

import pytest

from d2f_runtime.backends.scripted import ScriptedBackend
from lab.bench.__main__ import main
from lab.bench.steps import SHAPES, step_times


def test_every_shape_is_timed_and_no_slot_stays_open() -> None:
    backend = ScriptedBackend("some answer " * 20)
    found = step_times(backend, repeats=4)
    assert list(found) == list(SHAPES)
    assert all(spread["median"] > 0 for spread in found.values())
    assert not backend.open_slots


def test_a_record_names_its_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "script.json").write_text(json.dumps({"answers": "x" * 200}))
    output = tmp_path / "out" / "steps.json"
    main(["steps", str(folder), "--repeats", "4", "--turns", "1", "--output", str(output)])
    record = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out) == record["results"]
    assert record["command"].startswith("python -m lab.bench steps ")
    assert list(record["results"]) == ["scripted, none, cpu, scripted"]
