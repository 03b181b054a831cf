"""The bench of first questions: both ways give the same answers, and drafting takes fewer steps."""

import json
from pathlib import Path

from lab.bench.first_questions import QUESTIONS, main

FOLDER = Path(__file__).parents[2] / "models/smollm2-135m-d2f/smollm2_135m_d2f/model"


def test_shipped_drafts_save_steps_and_change_no_answer(tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    main(["--model", str(FOLDER), "--max-new", "12", "--repeats", "1", "--output", str(output)])
    results = json.loads(output.read_text())["results"]
    assert results["same_answers"] == len(QUESTIONS)
    assert results["token by token"]["steps"] == results["token by token"]["tokens"]
    assert results["shipped"]["steps"] < results["shipped"]["tokens"]
