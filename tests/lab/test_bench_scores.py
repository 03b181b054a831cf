"""The bench of scores: every way of decoding, graded, on a tiny adapter."""

import json
import shutil
from pathlib import Path

import pytest

from d2f_export.distill.from_ar.run import train_draft
from d2f_export.distill.from_ar.settings import DraftSettings
from lab.bench.scores import main
from tiny_checkpoints import write_model

pytestmark = pytest.mark.torch


def test_every_way_is_scored_and_timed(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    base, data = tmp_path / "base", tmp_path / "d.jsonl"
    write_model(base, "qwen2")
    lines = [{"prompt": f"Ann has {n}", "answer": f"{n} apples, and so on"} for n in range(6)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = DraftSettings(
        from_ar=str(base), data=(str(data),), rank=4, rows=1, clean_length=128, noisy_length=128,
        steps=2, block_sizes=(2, 4),
    )  # fmt: skip
    train_draft(settings, tmp_path / "run", cpu=True)
    sums, code = tmp_path / "sums.jsonl", tmp_path / "code.jsonl"
    sums.write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    task = {"prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n    f()\n"}
    code.write_text(json.dumps(task) + "\n")
    output, answers = tmp_path / "record.json", tmp_path / "answers.jsonl"
    main(
        ["--base", str(base), "--adapter", str(tmp_path / "run"), "--cpu", "--rows", "2",
         "--humaneval", str(code), "--gsm8k", str(sums), "--prompts", str(data), "--number", "2",
         "--verified", "3", "--unverified", "4:2:0.5", "--max-new", "9",
         "--timed", "1", "--output", str(output), "--answers", str(answers)]
    )  # fmt: skip
    results = json.loads(output.read_text())["results"]
    ways = {found["way"]: found for found in results["ways"]}
    assert [*ways] == ["base", "token by token", "verified 3", "unverified 4:2:0.5"]
    for way in ("token by token", "verified 3"):
        assert [ways[way][task]["same_as_base"] for task in ("humaneval", "gsm8k", "prompts")] == [
            1.0,
            1.0,
            1.0,
        ]
    assert ways["base"]["humaneval"]["score"] == 0.0
    assert "score" not in ways["base"]["prompts"]
    assert len(results["tokens_per_s_alone"]["prompts"]["verified 3"]) == 3
    assert len(answers.read_text().splitlines()) == 4 * (1 + 1 + 2)

    shutil.copytree(tmp_path / "run", tmp_path / "other")
    main(
        ["--base", str(base), "--adapter", str(tmp_path / "run"), str(tmp_path / "other"), "--cpu",
         "--gsm8k", str(sums), "--verified", "--unverified", "4:2:0.5", "4:1:0.5:position",
         "--without-base", "--max-new", "9", "--timed", "0", "--output", str(output)]
    )  # fmt: skip
    results = json.loads(output.read_text())["results"]
    wanted = ["unverified 4:2:0.5", "unverified 4:1:0.5:position"]
    names = [f"{name}: {way}" for name in ("run", "other") for way in wanted]
    assert [found["way"] for found in results["ways"]] == names
    assert "same_as_base" not in results["ways"][0]["gsm8k"]
    assert results["tokens_per_s_alone"] == {"gsm8k": {}}
