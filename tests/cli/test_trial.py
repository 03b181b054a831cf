"""Trials of backends, in processes of their own as the doctor runs them."""

import subprocess
import sys

import pytest

from d2f_stream.terminal import trial


def test_trial_that_crashes_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (outcome,) = trial.try_in_subprocess("onnx")
    assert not outcome.works
    assert outcome.detail == "crashed with exit code 1: no output"


def test_trial_that_hangs_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*args: object, **kwargs: object) -> None:
        raise subprocess.TimeoutExpired("python", trial.TIMEOUT_S)

    monkeypatch.setattr(subprocess, "run", hang)
    (outcome,) = trial.try_in_subprocess("onnx")
    assert outcome.detail == "no answer within 180 s"


def test_onnx_runs_the_embedded_model() -> None:
    pytest.importorskip("onnxruntime")
    outcome = trial.try_in_subprocess("onnx")[0]
    assert outcome.works, outcome.detail
    assert outcome.device == "cpu"


@pytest.mark.torch
def test_torch_runs_random_weights() -> None:
    pytest.importorskip("torch")
    outcome = trial.try_in_subprocess("torch")[0]
    assert outcome.works, outcome.detail
    assert outcome.detail.startswith("random weights: ")
