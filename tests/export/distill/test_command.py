import json
from pathlib import Path

import pytest

from d2f_stream import cli

pytestmark = pytest.mark.torch


def test_help_names_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["distill", "--help"])
    output = " ".join(capsys.readouterr().out.split())
    assert "--lora-rank N" in output
    assert "--schedule {monotone,random,ramp} mask ratios of the blocks (monotone)" in output
    assert "(1e-05)" in output


def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["distill", "--output", str(tmp_path / "run"), "--model", str(tmp_path)]
    assert cli.main(given) == 2
    assert capsys.readouterr().err == (
        "d2f-stream: error: data is missing; give --data, or data in --config\n"
    )
    assert cli.main([*given, "--data", "d", "--low", "0.9"]) == 2
    assert "low is 0.9 but must be at most high" in capsys.readouterr().err


def test_folder_without_a_model_is_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["distill", "--output", str(tmp_path / "run"), "--data", "d", "--model", str(tmp_path)]
    assert cli.main(given) == 2
    assert "has no config.json; is it a model folder?" in capsys.readouterr().err


def test_bench_times_a_tiny_shape(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("peft")
    from lab.bench.distill import main

    output = tmp_path / "record.json"
    arguments = ["--shape", "tiny", "--length", "32", "--steps", "1", "--cpu"]
    main([*arguments, "--output", str(output)])
    (result,) = json.loads(output.read_text())["results"]
    assert result["attention"] == "dense"
    assert result["tokens_per_s"] > 0
