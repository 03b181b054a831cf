"""The examples run as a reader would run them: real processes, the embedded model, no arguments."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def run(script: Path, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=100,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_local_stream_answers_the_question(tmp_path: Path) -> None:
    assert "The answer is " in run(EXAMPLES / "local_stream.py", tmp_path)


def test_many_questions_answers_each_of_them(tmp_path: Path) -> None:
    output = run(EXAMPLES / "many_questions.py", tmp_path)
    questions = re.findall(r"^(\d)\? ", output, flags=re.MULTILINE)
    assert questions == ["1", "2", "3"]
    for number in questions:
        blocks = re.findall(rf"^{number}: (.*)$", output, flags=re.MULTILINE)
        assert "The answer is" in " ".join(blocks)


def test_first_example_of_the_readme_answers_its_question(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    script = tmp_path / "readme.py"
    script.write_text(readme.split("```python\n")[1].split("```")[0], encoding="utf-8")
    assert "The answer is 52" in run(script, tmp_path)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_example_is_short_and_has_a_docstring(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60
    assert lines[0].startswith('"""')
