"""The bench of first questions: both ways give the same answers, and drafting takes fewer steps."""

import json
from pathlib import Path

import pytest

from installed_model import CHATS
from lab.bench import first_questions


@pytest.mark.usefixtures("one_core")
def test_shipped_drafts_save_steps_and_change_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = first_questions.QUESTIONS[1:3]
    monkeypatch.setattr(first_questions, "QUESTIONS", questions)
    output = tmp_path / "record.json"
    first_questions.main(
        ["--model", str(CHATS), "--max-new", "12", "--repeats", "1", "--output", str(output)]
    )  # fmt: skip
    results = json.loads(output.read_text())["results"]
    assert results["same_answers"] == len(questions)
    assert results["token by token"]["steps"] == results["token by token"]["tokens"]
    assert results["shipped"]["steps"] < results["shipped"]["tokens"]
