"""Ablation studies: their settings, their queue, and a study of tiny models from end to end."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from d2f_export.distill.corruption import BlockNoise
from lab.ablations.__main__ import main
from lab.ablations.laboratory import Lab
from lab.ablations.processes import Job, Places
from lab.ablations.queue import Queue, Teachers, run_queue
from lab.ablations.settings import (
    AS_PUBLISHED,
    PUBLISHED,
    RECORDED,
    SETTINGS,
    STUDIES,
    UNTRAINED,
    Records,
    Run,
    checked_settings,
    runs_of,
    settings_of,
)
from lab.embedded_model.tokenizer_training import train_tokenizer

pytestmark = pytest.mark.torch

RUN = Run("ramp", 0, steps=5, problems=3, recipe="tiny")
RECORD = {"setting": "ramp", "seed": 0, "steps": 5, "problems": 3, "recipe": "tiny"}
LATER = float("inf")


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path / "study", tmp_path / "tokenizer.json", "tiny")


def differences(setting: str) -> set[str]:
    """What a setting changes; the shares of the loss are one thing."""
    chosen, published = SETTINGS[setting], SETTINGS[PUBLISHED]
    changed = {"loss"} if chosen.weights != published.weights else set()
    noise, usual = chosen.noise, published.noise
    assert isinstance(noise, BlockNoise)
    assert isinstance(usual, BlockNoise)
    assert replace(chosen, noise=usual, weights=published.weights) == published
    changed |= {f.name for f in fields(noise) if getattr(noise, f.name) != getattr(usual, f.name)}
    return {"range" if name in {"low", "high"} else name for name in changed}


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "recipe"])
def test_a_setting_differs_from_the_published_one_in_one_thing(setting: str) -> None:
    assert len(differences(setting)) == (0 if setting == PUBLISHED else 1)


def test_every_setting_is_in_a_study_beside_the_published_one() -> None:
    assert {name for names in STUDIES.values() for name in names} == {
        *SETTINGS,
        *RECORDED,
        UNTRAINED,
    }
    assert all(PUBLISHED in names for names in STUDIES.values())
    assert AS_PUBLISHED.keys() == STUDIES.keys()


def test_the_first_seed_of_all_settings_runs_first_and_each_setting_once() -> None:
    runs = runs_of(settings_of(STUDIES), [7, 3], steps=5, problems=3, recipe="tiny")
    assert [run.seed for run in runs] == [7] * (len(runs) // 2) + [3] * (len(runs) // 2)
    assert len({run.setting for run in runs}) == len(runs) // 2
    assert runs[0].setting == PUBLISHED
    assert {run.steps for run in runs if run.setting == UNTRAINED} == {0}


def test_settings_can_be_named_one_by_one() -> None:
    assert checked_settings(["ramp", UNTRAINED, "ramp", PUBLISHED]) == [
        "ramp",
        UNTRAINED,
        PUBLISHED,
    ]
    with pytest.raises(SystemExit, match=r"there is no setting 'x'; there are: 'published', "):
        checked_settings(["ramp", "x"])


def test_records_know_what_was_run_and_drop_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    Records(path).add({**RECORD, "points": []})
    with path.open("a") as file:
        file.write('{"setting": "ran')
    records = Records(path)
    assert RUN in records
    assert replace(RUN, seed=1) not in records
    assert replace(RUN, steps=6) not in records
    records.add({**RECORD, "seed": 1})
    assert [json.loads(line)["seed"] for line in path.read_text().splitlines()] == [0, 1]


def names(queue: Queue, left_s: float = LATER) -> Iterator[str]:
    while (taken := queue.next(left_s)) is not None:
        yield taken[0]


def test_runs_wait_for_the_teacher_of_their_seed(lab: Lab) -> None:
    runs = [replace(RUN, seed=seed) for seed in (0, 1, 2)]
    queue = Queue(lab, runs, Teachers(number=2))
    assert [*names(queue)] == ["teacher-0", "teacher-1"]
    (lab.folder / "teacher-1").mkdir(parents=True)
    assert [*names(queue)] == ["ramp, seed 1"]
    (lab.folder / "teacher-0").mkdir()
    assert [*names(queue)] == ["ramp, seed 0", "ramp, seed 2"]
    assert not queue.runs


def test_teachers_that_are_there_are_not_made_again(lab: Lab, tmp_path: Path) -> None:
    (lab.folder / "teacher-1").mkdir(parents=True)
    runs = [RUN, replace(RUN, seed=1)]
    assert [*names(Queue(lab, runs, Teachers()))] == ["teacher-0", "ramp, seed 1"]
    given = Queue(lab, runs, Teachers(given=tmp_path))
    assert [*names(given)] == ["ramp, seed 0", "ramp, seed 1"]


def test_no_teacher_is_begun_that_would_not_be_done_in_time(lab: Lab) -> None:
    queue = Queue(lab, [RUN], Teachers(twin_seconds=60, seconds=200))
    assert queue.next(259) is None
    assert [*names(queue, 261)] == ["teacher-0"]


class Prepared(Queue):
    """Hands out jobs as they are."""

    def __init__(self, *jobs: "partial[Any]") -> None:
        self._jobs, self._runs = [*jobs], []

    def next(self, left_s: float) -> tuple[str, Job] | None:
        return ("a job", self._jobs.pop(0)) if self._jobs else None


def work(lab: Lab, *jobs: "partial[Any]", max_seconds: float = 60) -> tuple[list[str], list[str]]:
    """Return what failed and what was said."""
    records, said = Records(lab.folder / "records.jsonl"), list[str]()
    failed = run_queue(
        Prepared(*jobs),
        Places([], 1),
        lab,
        records,
        max_seconds=max_seconds,
        say=said.append,
        on_run=lambda: None,
    )
    return failed, said


def test_a_job_that_fails_is_named_and_the_next_one_goes_on(lab: Lab) -> None:
    record = {**RECORD, "points": [{"accuracy": 0.5, "tokens_per_step": 7.0}]}
    failed, said = work(lab, partial(int, "five"), partial(dict, record))
    assert len(failed) == 1
    assert "'five'" in failed[0]
    assert "50.0 % at 7.0 tokens a step" in said[1]
    assert RUN in Records(lab.folder / "records.jsonl")


def test_a_process_that_dies_is_named_and_does_not_hang_the_rest(lab: Lab) -> None:
    failed, _ = work(lab, partial(os._exit, 3))
    assert "ended with code 3" in failed[0]


def test_what_runs_at_the_time_limit_is_ended(lab: Lab) -> None:
    failed, said = work(lab, partial(signal.pause), max_seconds=0.1)
    assert not failed
    assert said == ["cpu-0: a job: the time was up"]


def test_a_study_goes_on_from_what_is_recorded_to_figures(tmp_path: Path) -> None:
    tokenizer, output = tmp_path / "tokenizer.json", tmp_path / "study"
    train_tokenizer(seed=1, num_problems=500).save(str(tokenizer))
    assert settings_of(["conditioning"]) == [PUBLISHED]  # fresh noise is only recorded
    (published, ramp) = runs_of(
        checked_settings([PUBLISHED, "ramp"]), [0], steps=2, problems=1, recipe="tiny"
    )
    Records(output / "records.jsonl").add(asdict(published))
    command = ["ablate", "--recipe", "tiny", "--tokenizer", str(tokenizer), "--gpus"]
    command += ["--output", str(output), "--steps", "2", "--problems", "1"]
    main(
        [*command, "--setting", PUBLISHED, "ramp", "recipe", "--max-seconds", "0"]
    )  # begins nothing
    main([*command, "--setting", PUBLISHED, "ramp"])
    lines = (output / "records.jsonl").read_text().splitlines()
    _, record = [json.loads(line) for line in lines]
    assert record.items() >= asdict(ramp).items()
    assert record["objective"]["noise"]["schedules"] == ["ramp"]
    assert {point["block_size"] for point in record["points"]} == {16, 32}
    weights = (output / "teacher-0" / "model.safetensors").stat().st_size
    assert weights < (output / ramp.folder / "model.safetensors").stat().st_size  # bf16
    origin = json.loads((output / "records.runs.jsonl").read_text().splitlines()[0])
    assert origin["command"].startswith("python -m lab.ablations")


def test_an_unknown_study_and_a_missing_file_end_with_one_sentence(tmp_path: Path) -> None:
    command = ["ablate", "--tokenizer", str(tmp_path / "none.json"), "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"there is no study 'x'; there are: loss, schedule"):
        main([*command, "--study", "x"])
    with pytest.raises(SystemExit, match=r"there is no .*none\.json"):
        main(command)


def test_settings_are_compared_with_the_published_one_of_their_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    records = Records(tmp_path / "records.jsonl")
    scores = {(PUBLISHED, 0): 0.9, (PUBLISHED, 1): 0.7, (PUBLISHED, 2): 0.6, (PUBLISHED, 3): 0.8}
    scores |= {("ramp", 0): 0.88, ("ramp", 1): 0.8, ("ramp", 2): 0.7, ("ramp", 3): 0.86}
    scores |= {("random", 0): 0.5, ("fresh noise", 7): 0.6}
    for (setting, seed), accuracy in scores.items():
        point = {"accuracy": accuracy, "tokens_per_step": 7.0}
        points = [
            {**point, "block_size": size, "max_active_blocks": active}
            for size in (16, 32)
            for active in (4, 1)
        ]
        run = {**RECORD, "setting": setting, "seed": seed, "teacher": "ABCA"[seed % 4]}
        records.add({**run, "points": points})
    main(["plot", str(records.path), "--output", str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").stat().st_size > 0
    shown = capsys.readouterr().out
    assert "schedule: A, B, C" in shown
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in shown.splitlines()}
    assert rows["| monotone"][0] == "85.0 / 70.0 / 60.0"  # seeds 0 and 3 are A's
    # of Student's distribution for three teachers: 4.30 times the error of the mean, which is 2.67
    gain = "+7.3 \N{PLUS-MINUS SIGN} 11.5 (+2.0 / +10.0 / +10.0)"
    assert rows["| ramp"][:2] == ["87.0 / 80.0 / 70.0", gain]
    assert rows["| ramp"][2] == "7.0 / 7.0 / 7.0"
    dashes = "/ \N{EN DASH} / \N{EN DASH})"
    assert rows["| random"][1] == f"\N{MINUS SIGN}40.0 (\N{MINUS SIGN}40.0 {dashes}"
    assert "fresh noise" not in shown  # its seed has no published run


def test_nothing_to_compare_is_said(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = Records(tmp_path / "records.jsonl")
    records.add({**RECORD, "points": []})
    with pytest.raises(SystemExit, match="no setting shares a seed"):
        main(["plot", str(records.path), "--output", str(tmp_path / "figure.png")])
