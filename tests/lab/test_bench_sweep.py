import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from d2f_runtime.evaluation.samples import opened
from d2f_stream.core.errors import InvalidParams
from lab.bench.__main__ import main
from lab.bench.sweep import COLUMNS, Table, sweep
from lab.bench.sweep_grid import SYSTEMS, Grid, Setting, settings_of
from lab.bench.sweep_tasks import HarnessTask, ProblemTask

SETTINGS = settings_of(Grid(block_size=(8,), add=(0.1,), activate=(0.95,)), ["d2f"])


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "scripted"
    folder.mkdir()
    script = {"answers": "It is 7. The answer is 7.", "tokens_per_step": 2}
    (folder / "script.json").write_text(json.dumps(script))
    return str(folder)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    endings = ["The answer is 7.", "The answer is 8.", "The answer is 7.", "The answer is 7."]
    path = tmp_path / "task.jsonl"
    lines = [json.dumps({"prompt": f"{n}?", "ending": end}) for n, end in enumerate(endings)]
    path.write_text("\n".join(lines))
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


async def run(
    model: str,
    task: Path,
    output: Path,
    *,
    settings: Sequence[Setting] = SETTINGS,
    number: int = 4,
    timed: bool = False,
    **changes: Any,
) -> int:
    problems = ProblemTask.read(task, number, concurrency=2, timed=timed)
    async with opened(model, concurrency=2) as engine:
        return await sweep(engine, problems, output, settings, **changes)


async def test_every_setting_becomes_a_row(model: str, task: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "sweep.csv"
    assert await run(model, task, output) == len(SETTINGS) == 5
    rows = rows_of(output)
    assert [row["confidence_threshold"] for row in rows] == ["0.7", "0.8", "0.9", "0.95", "0.99"]
    assert {row["score"] for row in rows} == {"0.75"}
    assert {row["task"] for row in rows} == {"task"}
    assert all(float(row["tokens_per_step"]) > 1 for row in rows)
    assert {row["tokens_per_s"] for row in rows} == {""}


async def test_rows_that_are_there_are_not_run_again(
    model: str, task: Path, tmp_path: Path
) -> None:
    output = tmp_path / "sweep.csv"
    assert await run(model, task, output, settings=SETTINGS[:2]) == 2
    said: list[str] = []
    assert await run(model, task, output, say=said.append) == 3
    assert [line.endswith("already there") for line in said] == [True, True, False, False, False]
    assert await run(model, task, output) == 0
    assert await run(model, task, output, settings=SETTINGS[:1], number=2) == 1
    assert len(rows_of(output)) == 6


async def test_row_that_was_cut_off_is_run_again(model: str, task: Path, tmp_path: Path) -> None:
    output = tmp_path / "sweep.csv"
    await run(model, task, output, settings=SETTINGS[:2])
    whole = output.read_text()
    output.write_text(whole[:-10])
    assert await run(model, task, output, settings=SETTINGS[:2]) == 1
    assert output.read_text() == whole


async def test_speed_is_measured_only_where_asked_for(
    model: str, task: Path, tmp_path: Path
) -> None:
    output = tmp_path / "sweep.csv"
    await run(model, task, output, settings=SETTINGS[:1], timed=True)
    assert float(rows_of(output)[0]["tokens_per_s"]) > 0


async def test_progress_counts_the_answers(model: str, task: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def note(_: str, done: int, total: int) -> None:
        seen.append((done, total))

    await run(model, task, tmp_path / "s.csv", settings=SETTINGS[:1], on_progress=note)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


async def test_setting_that_the_model_refuses_is_an_error(
    model: str, task: Path, tmp_path: Path
) -> None:
    output = tmp_path / "sweep.csv"
    with pytest.raises(InvalidParams, match="block_size is 1024"):
        await run(model, task, output, settings=[Setting("d2f", {"block_size": 1024})])
    assert rows_of(output) == []


def test_other_files_are_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "notes.csv"
    path.write_text("name,value\na,1\n")
    with pytest.raises(InvalidParams, match=r"notes\.csv"):
        Table(path)
    assert path.read_text() == "name,value\na,1\n"


def test_thresholds_are_tried_one_by_one_or_crossed() -> None:
    grid = Grid(block_size=(16, 32))
    alone = settings_of(grid, ["d2f"])
    assert len(alone) == 2 * (5 + 3 + 4 - 2)  # the default point is in each of three axes
    crossed = settings_of(Grid(block_size=(16, 32), crossed=True), ["d2f"])
    assert len(crossed) == 2 * 5 * 3 * 4
    assert {str(setting.overrides) for setting in alone} <= {
        str(setting.overrides) for setting in crossed
    }


def test_systems_differ_in_what_makes_them() -> None:
    found = settings_of(Grid(block_size=(16,)), SYSTEMS)
    by_system = {setting.system: setting.overrides for setting in found}
    assert list(by_system) == list(SYSTEMS)
    assert by_system["fixed-count"] == {
        name: value for name, value in by_system["vanilla"].items() if name != "attention"
    }
    assert by_system["no-pipeline"]["max_active_blocks"] == 1
    assert by_system["vanilla"]["attention"] == "full"
    assert by_system["vanilla"]["num_per_step"] == 1
    assert by_system["ar"]["block_size"] == 1


def test_command_writes_the_table_and_where_it_comes_from(
    model: str, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "sweep.csv"
    grid = ["--block-size", "8", "--confidence", "0.9", "--add", "0.1", "--activate", "0.95"]
    given = ["sweep", "--model", model, "--label", "seven", "--task", str(task), *grid]
    main([*given, "--system", "d2f", "--output", str(output)])
    assert capsys.readouterr().out == f"1 rows added to {output}\n"
    (row,) = rows_of(output)
    assert tuple(row) == COLUMNS
    assert (row["model"], row["num_problems"]) == ("seven", "4")
    (origin,) = map(json.loads, (tmp_path / "sweep.runs.jsonl").read_text().splitlines())
    assert origin["command"].startswith("python -m lab.bench sweep --model")
    assert {"commit", "date", "processor", "versions"} <= origin.keys()


def test_unknown_system_is_named() -> None:
    with pytest.raises(InvalidParams, match="system is 'gpt' but must be one of d2f"):
        settings_of(Grid(), ["gpt"])


async def test_task_of_lm_eval_is_scored_by_its_metric(model: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'd2f-stream[eval]'")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in (("x", 7), ("y", 8))))
    (tmp_path / "seven.yaml").write_text(
        f"""
task: seven
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path / "cache"}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_target: "It is {{{{a}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 32}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
    )
    task = HarnessTask("seven", 2, tmp_path, {"model": model, "batch_size": 2})
    output = tmp_path / "sweep.csv"
    async with opened(model, concurrency=2) as engine:
        assert await sweep(engine, task, output, SETTINGS[:1]) == 1
        assert await sweep(engine, task, output, SETTINGS[:1]) == 0
    (row,) = rows_of(output)
    assert (row["task"], row["score"], row["max_new_tokens"]) == ("seven", "0.5", "task")
    assert float(row["tokens_per_step"]) > 1
