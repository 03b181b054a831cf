"""The examples run as a reader would run them: real processes, the shipped models, no arguments."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from installed_model import python_path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def run(script: Path, folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
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


def obey_interrupts() -> None:
    """Undo what a shell does to its background jobs, of which this may be one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_local_stream_answers_the_question(tmp_path: Path) -> None:
    assert "The answer is " in run(EXAMPLES / "local_stream.py", tmp_path)


def test_many_questions_answers_each_of_them(tmp_path: Path) -> None:
    output = run(EXAMPLES / "many_questions.py", tmp_path)
    questions = re.findall(r"^(\d)\? ", output, flags=re.MULTILINE)
    assert questions == ["1", "2", "3"]
    for number in questions:
        blocks = re.findall(rf"^{number}: (.*)$", output, flags=re.MULTILINE)
        assert "The answer is" in " ".join(blocks)


@pytest.mark.usefixtures("one_core")
def test_websocket_client_gets_its_answer_from_the_websocket_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", python_path(tmp_path))
    server = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "websocket_server.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=obey_interrupts,
    )
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split()[-1]
        output = run(EXAMPLES / "websocket_client.py", tmp_path, address)
        assert output.startswith(f"smollm2-135m-d2f answers at {address}\n")
        assert "Tokyo" in output
    finally:
        server.send_signal(signal.SIGINT)
        try:
            rest, errors = server.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            server.kill()
            raise
    assert (server.returncode, rest, errors) == (0, "stopped\n", "")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_example_is_short_and_has_a_docstring(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60
    assert lines[0].startswith('"""')
