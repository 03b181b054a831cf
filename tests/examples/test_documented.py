"""What README, docs, docstrings and --help tell people to run does run, and is answered.

Python examples run as they stand, one after another in a process that keeps the model loaded, with
what they leave open filled in below: addresses lead to a
server and a broker of the test's own, and models whose weights are elsewhere are replaced by the
default one: the package of the repository where it is asked something, else the embedded one. Shell
commands that ask a model or set something are run here, and their kinds in `RUN_BY` by the tests
named there; all others stand on pages that say what they need, and their options must exist.
"""

import ast
import functools
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from brokers import Mosquitto
from d2f_stream.terminal.arguments import QUESTION
from example_reader import PROBLEM, Reader
from installed_model import python_path
from requirements import require_module

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGES = [ROOT / "d2f_stream", ROOT / "runtime" / "d2f_runtime"]
ANSWERS = {
    "What is the capital of Japan?": "Tokyo",
    "Why is the sky blue?": "scatter",
    PROBLEM: "The answer is 52",
}

PAST = {"open-text.md"}  # the record of an experiment whose code is gone
ELSEWHERE = {"simple_evaluate": "fetches a data set"}
FILLED_IN = (
    (r"d2f_stream\.load\([^)]*\)", "d2f_stream.load()"),
    (r"//127\.0\.0\.1:8000", "//127.0.0.1:{port}"),
    (r"mqtt://alice(:secret)?@broker:1883", "mqtt://alice@127.0.0.1:{broker}"),
)
RUN_BY = {  # what is documented without a model of its own
    "chat": "cli/test_chat.py",
    "doctor": "cli/test_doctor.py",
    "models": "cli/test_models_command.py",
    "serve": "examples/test_documented.py",
}
NEEDY = r"--(adapter|engines|log|mqtt|device)\b|--model (?!word-problems)|models pull|[ =]sdar"
NEEDS = re.compile(r"^\*(?:Commands|Some commands) here need [^*]+\.\*$", re.MULTILINE)
pytestmark = pytest.mark.usefixtures("one_core")

DOCSTRING = r'(?s)""".*?"""'
SHELL_BLOCKS = [
    block
    for page in PAGES
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.M)
]


def python_examples() -> Iterator[tuple[str, str]]:
    """Yield where each stands, and its code."""
    for page in PAGES:
        fences = re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.M)
        yield from ((f"{page.name}-{number}", code) for number, code in enumerate(fences, 1))
    for path in (path for package in PACKAGES for path in sorted(package.rglob("*.py"))):
        text = path.read_text("utf-8")
        if not any(re.search(r"\ba(sync|wait) ", doc) for doc in re.findall(DOCSTRING, text)):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                for block in re.findall(
                    r"(?<=\n\n)(?: {4,}.*\n)+", (ast.get_docstring(node) or "") + "\n"
                ):
                    if "async " in block or "await " in block:
                        name = getattr(node, "name", "module")
                        yield f"{path.stem}.{name}", textwrap.dedent(block)


def shell_commands() -> Iterator[tuple[str, str]]:
    """Yield where each stands, and the command with its continuation lines."""
    for page in PAGES:
        text = re.sub(r"\\\n +", "", page.read_text("utf-8")).replace("# or: ", "\n    ")
        for line in re.findall(r"^ {4}((?:d2f-stream|python -m|pip|scripts/)\S* .*)", text, re.M):
            is_synopsis = "[-" in line or re.search(r"[a-z] \| [a-z]", line)
            if not is_synopsis and page.name not in PAST:
                yield page.name, re.split(r"\s+#|\s{3,}", line)[0]


def answer_to(asked: str) -> str:
    """Return what must stand in the answer to whatever is asked in a command or a program."""
    return next((answer for text, answer in ANSWERS.items() if text in asked), ANSWERS[PROBLEM])


def models_for(asked: str, folder: Path) -> dict[str, str]:
    """Return the environment in which the model answers that is meant to; the small one starts
    faster, and is what there is without a package.
    """
    return {} if answer_to(asked) == ANSWERS[PROBLEM] else {"PYTHONPATH": python_path(folder)}


def asking_embedded(code: str) -> str:
    """Return an example that asks what the embedded model, which the servers here have, answers."""
    return functools.reduce(lambda text, asked: text.replace(asked, PROBLEM), ANSWERS, code)


def run(command: list[str], folder: Path, **options: str) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, encoding="utf-8", timeout=300, check=False,
        env={**os.environ, **options}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    mosquitto = Mosquitto(tmp_path_factory.mktemp("broker"))
    mosquitto.start()
    with Served("--mqtt", mosquitto.url):
        yield mosquitto.port
    mosquitto.stop()


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with Served() as process:
        assert process.stdout is not None
        found = re.search(r":(\d+) ", process.stdout.readline())
        assert found is not None
        yield int(found[1])


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with Reader(python_path(tmp_path_factory.mktemp("package"))) as process:
        yield process


@pytest.fixture(scope="module")
def small_reader() -> Iterator[Reader]:
    with Reader(os.environ.get("PYTHONPATH", "")) as process:
        yield process


class Served:
    """A server over the embedded model, ready, in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        self._command = [sys.executable, "-m", "d2f_stream.cli", "serve", "--port", "0", *arguments]

    def __enter__(self) -> subprocess.Popen[str]:
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.communicate(timeout=60)


@pytest.mark.parametrize(("where", "code"), list(python_examples()))
def test_python_example_runs(
    where: str, code: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if reason := next((why for text, why in ELSEWHERE.items() if text in code), None):
        pytest.skip(reason)
    for pattern, replacement in FILLED_IN:
        if re.search(pattern, code):
            if "{port}" in replacement:
                replacement = replacement.format(port=request.getfixturevalue("server"))
                code = asking_embedded(code)
            elif "{broker}" in replacement:
                replacement = replacement.format(broker=request.getfixturevalue("broker"))
            code = re.sub(pattern, replacement, code)
    small = answer_to(code) == ANSWERS[PROBLEM]
    reader: Reader = request.getfixturevalue("small_reader" if small else "reader")
    output = reader.run(code, tmp_path)
    if "print(" in code:
        assert answer_to(code) in output


def test_llm_answers_with_the_documented_settings(server: int, tmp_path: Path) -> None:
    require_module("llm")
    page = (ROOT / "docs" / "how-to" / "clients.md").read_text("utf-8")
    section = page.partition("## llm\n")[2]
    settings, command = re.findall(r"^```(?:yaml|bash)\n(.*?)^```", section, re.DOTALL | re.M)[:2]
    models = tmp_path / "extra-openai-models.yaml"
    models.write_text(settings.replace("127.0.0.1:8000", f"127.0.0.1:{server}"))
    command = asking_embedded(command)
    program, *arguments = shlex.split(command)
    module = [sys.executable, "-W", "ignore", "-m", program]
    told = run([*module, *arguments], tmp_path, LLM_USER_PATH=str(tmp_path))
    assert answer_to(command) in told


@pytest.mark.parametrize("block", SHELL_BLOCKS)
def test_shell_example_is_answered(block: str, tmp_path: Path) -> None:
    shim = tmp_path / "d2f-stream"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m d2f_stream.cli "$@"\n')
    shim.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    models = models_for(block, tmp_path)
    told = run(["bash", "-euo", "pipefail", "-c", block], tmp_path, PATH=path, **models)
    assert answer_to(block) in told


def is_run(command: str) -> bool:
    """Whether a test runs such a command; for setting up, that is what runs all tests."""
    program, *arguments = shlex.split(command, comments=True)
    if program in ("pip", "llm") or program.startswith("scripts/"):
        return True
    if program != "d2f-stream" or re.search(NEEDY, command):
        return "http.server" in arguments
    return arguments[0] in ("config", "generate", *RUN_BY)


def test_pages_say_what_commands_need_that_no_test_runs() -> None:
    lacking = {page for page, command in shell_commands() if not is_run(command)}
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.M):
            lacking |= set() if is_run(block) else {page.name}
    assert [name for name in RUN_BY.values() if not (ROOT / "tests" / name).is_file()] == []
    silent = [page for page in PAGES if not NEEDS.search(page.read_text("utf-8"))]
    assert [page.name for page in silent if page.name in lacking] == []


@functools.cache
def help_of(*command: str) -> str:
    return run([*command, "--help"], ROOT)


@pytest.mark.parametrize(("page", "command"), list(shell_commands()))
def test_documented_command_exists_with_its_options(
    page: str, command: str, tmp_path: Path
) -> None:
    program, *arguments = shlex.split(command, comments=True)
    if program == "pip":
        for wanted in (argument for argument in arguments[1:] if argument[0] != "-"):
            path, _, extras = wanted.rstrip("]").partition("[")
            if path[0] == ".":
                assert (ROOT / path / "pyproject.toml").is_file()
            assert {extra for extra in extras.split(",") if extra} <= set(declared_extras())
        return
    if program.startswith("scripts/"):
        assert os.access(ROOT / program, os.X_OK)
        if arguments:
            cli = [sys.executable, "-m", "d2f_stream.cli", "generate"]
            models = {"PYTHONPATH": python_path(tmp_path)}
            assert "sleep" in run([*cli, *arguments, "--max-new-tokens", "64"], tmp_path, **models)
        return
    module = ["d2f_stream.cli"]
    if program == "python" and arguments[1] == "pytest":
        assert [path for path in arguments[2:] if not (ROOT / path).exists()] == []
        return
    if program == "python":
        module, arguments = [arguments[1]], arguments[2:]
    if module == ["d2f_stream.cli"] and is_run(command) and arguments[0] in ("config", "generate"):
        assert_runs(command, arguments, tmp_path)
        return
    if arguments and re.fullmatch(r"[a-z][a-z_-]*", arguments[0]):
        module.append(arguments.pop(0))
    if module == ["d2f_runtime.evaluation"]:
        module.append("run")  # which lm-eval takes where none of its commands is named
    if "--from-ar" in arguments:
        module += ["--from-ar", "MODEL"]  # has options of its own
    told = help_of(sys.executable, "-m", *module)
    options = [text.split("=")[0] for text in arguments if text.startswith("--")]
    assert [option for option in options if option not in told] == []


def assert_runs(command: str, arguments: list[str], folder: Path) -> None:
    """Run it with a prompt for PROMPT, and settings of its own."""
    words = [PROBLEM if word == "PROMPT" else word for word in arguments]
    given = words.index("<") if "<" in words else len(words)
    words = [*words[:given], *([PROBLEM] if given < len(words) else [])]
    cli = [sys.executable, "-m", "d2f_stream.cli"]
    told = run([*cli, *words], folder, XDG_CONFIG_HOME=str(folder))
    wanted = "block.committed" if "--json" in words else answer_to(command)
    assert words[0] == "config" or wanted in told


def declared_extras() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return list(project["optional-dependencies"])


def test_question_of_the_help_is_answered_above() -> None:
    command = f'd2f-stream generate "{QUESTION}"\n'
    assert command in help_of(sys.executable, "-m", "d2f_stream.cli", "generate") + "\n"
    assert any(command in block for block in SHELL_BLOCKS)
