"""The benchmarks of exported models run, agree with each other and are recorded."""

import json
from pathlib import Path

import pytest

from lab.onnx_bench.__main__ import main

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("one_core")]

ROOT = Path(__file__).parents[2]


def test_a_large_run_times_every_part_and_records_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "large.json"
    given = "large --shape tiny --device cpu --quantize fp32 --quantize int4-fp16 --torch fp32"
    more = f"--steps 2 --width 32 --cached 40 --output {output}"
    main([*given.split(), *more.split()])
    record = json.loads(output.read_text())
    results = record["results"]
    assert json.loads(capsys.readouterr().out) == results
    assert record["command"].startswith("python -m lab.onnx_bench large --shape tiny")
    assert list(results) == ["onnx fp32", "onnx int4-fp16", "torch fp32"]
    for name in ("onnx fp32", "onnx int4-fp16"):
        assert results[name]["window 32"]["backend_ms"]["median"] > 0
        assert results[name]["bytes"] > 100_000
    assert results["torch fp32"]["tiny fp32"]["window 32"]["backend_ms"]["median"] > 0


def test_a_part_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    output = tmp_path / "large.json"
    given = "large --shape tiny --device cpu --quantize int3 --torch fp32 --steps 1 --width 32"
    main([*given.split(), "--output", str(output)])
    results = json.loads(output.read_text())["results"]
    assert "failure" in results["onnx int3"]
    assert "window 32" in results["torch fp32"]["tiny fp32"]


def test_a_run_out_of_time_says_what_it_left_out(tmp_path: Path) -> None:
    output = tmp_path / "large.json"
    given = ["large", "--shape", "tiny", "--device", "cpu", "--seconds", "0"]
    main([*given, "--output", str(output)])
    results = json.loads(output.read_text())["results"]
    assert set(results.values()) == {"left out: the time was up"}


def test_a_small_run_compares_quantizations_and_torch(tmp_path: Path) -> None:
    output = tmp_path / "small.json"
    checkpoint, prompts = ROOT / "export/checkpoints/word-problems", ROOT / "bench/prompts.jsonl"
    given = ["small", "--checkpoint", str(checkpoint), "--prompts", str(prompts), "--number", "1"]
    more = ["--repeats", "1", "--turns", "1", "--step-repeats", "2", "--starts", "0"]
    main([*given, *more, "--output", str(output)])
    results = json.loads(output.read_text())["results"]
    sizes = results["bytes"]
    assert sizes["onnx int4"] < sizes["onnx int8"] < sizes["onnx fp32"]
    assert len(results["steps"]) == 4
    assert set(results["stream"]) >= {"onnx fp32", "onnx int8", "onnx int4", "torch"}
