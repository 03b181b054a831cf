"""A real Valkey or Redis server for tests, and streams of a log that no engine wrote."""

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from d2f_stream.core.events import (
    Block,
    Event,
    StreamFinished,
    StreamStarted,
    Timings,
    Usage,
)
from d2f_stream.wire.protocol import Generate
from requirements import require_module, require_program

PATIENCE_S = 20.0


class ValkeyServer:
    """A server on a free port of the loopback; keeps port and folder over restarts."""

    def __init__(self, folder: Path, *, lines: Sequence[str] = ()) -> None:
        require_module("valkey")
        name = "valkey-server" if shutil.which("valkey-server") else "redis-server"
        self._program = require_program(name)
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        settings = [
            f"port {self.port}",
            "bind 127.0.0.1",
            f"dir {folder}",
            'save ""',
            f"logfile {folder}/log",
            *lines,
        ]
        self.config = folder / "valkey.conf"
        self.config.write_text("\n".join(settings) + "\n")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"valkey://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, and wait until it answers."""
        self._process = subprocess.Popen(
            [self._program, str(self.config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            assert self._process.poll() is None, (self._folder / "log").read_text()
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self.port), timeout=1.0),
            ):
                return
        pytest.fail("the store does not listen")

    def kill(self) -> None:
        """End it at once; what it had not written is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def request(name: str = "request", *, prompt: str = "hi") -> Generate:
    return Generate(request_id=name.ljust(16, "-"), prompt=prompt)


def events_of(stream_id: str, *, num_blocks: int = 3, text: str = "x") -> list[Event]:
    """A whole answer, block by block."""
    first = StreamStarted(
        stream=stream_id, seq=0, request_id="r", model="m", block_size=4, prompt_tokens=1
    )
    blocks = [
        Block(
            stream=stream_id,
            seq=number + 1,
            index=number,
            start=4 * number,
            stop=4 * number + 4,
            text=f"{text}{number}",
            token_ids=(1, 2, 3, number),
            steps=number + 1,
            elapsed_ms=float(number),
        )
        for number in range(num_blocks)
    ]
    last = StreamFinished(
        stream=stream_id,
        seq=num_blocks + 1,
        reason="eos",
        text_length=2 * num_blocks,
        usage=Usage(prompt_tokens=1, completion_tokens=4 * num_blocks, steps=num_blocks),
        timings=Timings(first_block_ms=0.0, total_ms=1.0),
    )
    return [first, *blocks, last]
