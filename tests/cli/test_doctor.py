"""The doctor's report, from scripted installations and trials, and from this very environment."""

import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import pytest

from d2f_stream import cli
from d2f_stream.terminal import doctor
from d2f_stream.terminal.doctor import Report, describe, examine
from d2f_stream.terminal.trial import Trial

ROOT = Path(__file__).resolve().parents[2]
BARE = {"d2f-stream": "0.1.0", "msgspec": "0.22.0"}
EDGE = {
    **BARE,
    "onnxruntime": "1.31.1",
    "tokenizers": "0.23.3",
    "numpy": "2.4.6",
    "jinja2": "3.1.6",
    "rich": "15.0.0",
    "prompt-toolkit": "3.0.53",
}


def working(backend: str) -> Sequence[Trial]:
    return [Trial(backend=backend, device="cpu", works=True, detail="first block in 0.01 s")]


def broken(backend: str) -> Sequence[Trial]:
    return [Trial(backend=backend, device="cpu", works=False, detail="no such model")]


def examined(
    versions: Mapping[str, str], try_backend: Callable[[str], Sequence[Trial]] = working
) -> Report:
    return examine(version_of=versions.get, try_backend=try_backend)


def test_bare_installation_works_with_no_backend_and_names_the_commands() -> None:
    report = examined(BARE)
    assert not report.works
    assert "onnxruntime is not installed; run: pip install 'd2f-stream[edge]'" in describe(report)
    assert "torch is not installed; run: pip install 'd2f-stream[torch]'" in describe(report)


def test_one_working_backend_is_enough() -> None:
    report = examined(EDGE)
    assert [(trial.backend, trial.works) for trial in report.trials] == [
        ("onnx", True),
        ("torch", False),
    ]
    assert report.works


def test_installed_backend_that_fails_its_trial_does_not_work() -> None:
    report = examined(EDGE, broken)
    assert not report.works
    assert "no such model" in describe(report)


def test_complete_extra_lacks_nothing_and_others_say_what_they_lack() -> None:
    extras = {extra.name: extra for extra in examined(EDGE).extras}
    assert extras["edge"].missing == ()
    assert extras["torch"].missing == ("gguf", "huggingface-hub", "safetensors", "torch")
    assert extras["torch"].command == "pip install 'd2f-stream[torch]'"


def test_every_extra_for_users_is_told() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    told = {extra.name for extra in examined(EDGE).extras}
    assert told == set(project["optional-dependencies"]) - {"dev", "docs"}


def test_both_onnxruntime_wheels_are_a_problem() -> None:
    report = examined({**EDGE, "onnxruntime-gpu": "1.31.1"})
    assert "both installed" in report.problems[0]
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in describe(report)


def test_an_onnxruntime_that_is_too_old_is_a_problem() -> None:
    (problem,) = examined({**EDGE, "onnxruntime": "1.9.2"}).problems
    assert problem.startswith("onnxruntime 1.9.2 is too old for exported models, which need 1.23")
    assert problem.endswith("run: pip install -U onnxruntime")
    assert examined({**EDGE, "onnxruntime": "1.23.0"}).problems == ()


def test_gpu_wheel_alone_is_tried_and_is_no_problem() -> None:
    versions = {name: version for name, version in EDGE.items() if name != "onnxruntime"}
    report = examined({**versions, "onnxruntime-gpu": "1.31.1"})
    assert report.trials[0].works
    assert report.problems == ()


def test_checkout_that_is_not_installed_is_a_problem() -> None:
    report = examined({"msgspec": "0.22.0"})
    assert "pip install -e '.[edge]'" in describe(report)


@pytest.mark.parametrize(("try_backend", "code"), [(working, 0), (broken, 1)])
def test_exit_code_tells_whether_a_backend_works(
    try_backend: Callable[[str], Sequence[Trial]],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "try_in_subprocess", try_backend)
    monkeypatch.setattr(doctor, "installed_version", EDGE.get)
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().out.startswith("d2f-stream ")


def test_json_report_reads_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "try_in_subprocess", working)
    assert cli.main(["doctor", "--json"]) == 0
    report = msgspec.json.decode(capsys.readouterr().out, type=Report)
    assert report.d2f_stream
    assert "msgspec" in [package.name for package in report.packages]


def test_doctor_imports_no_backend_in_its_own_process() -> None:
    code = (
        "import sys; from d2f_stream.terminal import doctor\n"
        "doctor.describe(doctor.examine(try_backend=lambda backend: []))\n"
        "assert not {'torch', 'onnxruntime', 'numpy', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
