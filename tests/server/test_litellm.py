"""LiteLLM as a client of the server: of OpenAI's API and of Ollama's, over the network."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import fakes
from browser.page_server import ScriptedServer

PROGRAM = Path(__file__).parent / "asked_by_litellm.py"


@pytest.fixture(scope="module")
def reports() -> Mapping[str, Any]:
    with ScriptedServer(is_held=False) as server:
        command = [sys.executable, str(PROGRAM), server.url.rstrip("/")]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert asked.returncode == 0, asked.stderr
    report: Mapping[str, Any] = json.loads(asked.stdout.splitlines()[-1])
    return report


@pytest.mark.parametrize("api", ["openai", "ollama"])
def test_litellm_is_answered(reports: Mapping[str, Any], api: str) -> None:
    report = reports[api]
    assert (report["text"], report["finish_reason"]) == (fakes.ANSWER, "stop")
    assert report["num_tokens"] == len(fakes.ANSWER.encode()) + 1  # a byte each, and the end
    assert "".join(report["streamed"]) == report["streamed_to_coroutine"] == fakes.ANSWER
    assert len(report["streamed"]) > 1


@pytest.mark.parametrize("api", ["openai", "ollama"])
def test_litellm_tells_of_a_refusal(reports: Mapping[str, Any], api: str) -> None:
    assert "temperature" in reports[api]["refusal"]
