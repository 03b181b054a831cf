import json
from pathlib import Path

import pytest

from lab.bench.__main__ import main
from lab.records import spread


def scripted_model(folder: Path, tokens_per_step: int) -> Path:
    folder.mkdir()
    script = {"answers": "The answer is 7.", "tokens_per_step": tokens_per_step}
    (folder / "script.json").write_text(json.dumps(script))
    return folder


def test_contenders_answer_the_same_prompts_and_are_recorded(tmp_path: Path) -> None:
    quick = scripted_model(tmp_path / "quick", 8)
    slow = scripted_model(tmp_path / "slow", 2)
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"{n}?", "ending": "The answer is 7."} for n in range(3)]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    output = tmp_path / "record.json"
    setting = '{"max_new_tokens": 32}'
    contenders = [f"--contender=quick={quick}={setting}", f"--contender=slow={slow}={setting}"]
    machine = ["--repeats=2", "--device=cpu", f"--output={output}"]
    main(["stream", *contenders, f"--prompts={prompts}", *machine])

    record = json.loads(output.read_text())
    results = record["results"]
    assert results["quick"]["answer_ms"]["count"] == 6
    assert results["quick"]["right"] == results["slow"]["right"] == 1.0
    assert results["quick"]["tokens_per_step"] > results["slow"]["tokens_per_step"]
    assert {"command", "commit", "date", "processor", "versions"} <= record.keys()


def test_spread_is_the_median_between_deciles() -> None:
    assert spread([float(n) for n in range(1, 12)]) == {
        "median": 6.0,
        "p10": pytest.approx(1.2),
        "p90": pytest.approx(10.8),
        "count": 11,
    }
    assert spread([3.0]) == {"median": 3.0, "p10": 3.0, "p90": 3.0, "count": 1}
