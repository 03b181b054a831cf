"""The device of examples/ runs as a reader would run it."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from brokers import Mosquitto, worker
from d2f_runtime.backends.scripted import ScriptedBackend
from fakes import ANSWER

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "mqtt_device.py"


@pytest.mark.mqtt
@pytest.mark.usefixtures("nothing_left")
async def test_device_prints_the_answer(mosquitto: Mosquitto, tmp_path: Path) -> None:
    async with worker(mosquitto.url, ScriptedBackend(ANSWER)):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(EXAMPLE)),
            cwd=tmp_path,
            env={**os.environ, "BROKER": mosquitto.url, "PYTHONIOENCODING": "utf-8"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await process.communicate()
    assert errors == b""
    assert output.decode() == f"scripted answers:\n{ANSWER}\n"
