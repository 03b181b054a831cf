"""Ctrl-C in a real terminal: a subprocess on a pty, interrupted once its first block is out."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pty = pytest.importorskip("pty", reason="needs a POSIX terminal")

SCRIPTED_CLI = Path(__file__).resolve().parents[1] / "scripted_cli.py"
SHOW_CURSOR, HIDE_CURSOR = b"\x1b[?25h", b"\x1b[?25l"


class Terminal:
    """A process whose standard output and input are a terminal of 80 columns."""

    def __init__(self, *arguments: str) -> None:
        self._master, terminal = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
        environment.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPTED_CLI), "generate", "Well?", *arguments],
            stdin=terminal,
            stdout=terminal,
            stderr=subprocess.PIPE,
            env=environment,
        )
        os.close(terminal)
        self.output = b""

    def read_until(self, wanted: bytes) -> None:
        while wanted not in self.output:
            self.output += self._read()

    def finish(self) -> tuple[int, bytes]:
        """Read to the end; return the exit code and what went to stderr."""
        with contextlib.suppress(OSError):  # what Linux raises once the other side is closed
            while data := self._read():
                self.output += data
        assert self.process.stderr is not None
        return self.process.wait(), self.process.stderr.read()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
        os.close(self._master)

    def _read(self) -> bytes:
        return os.read(self._master, 65536)


@contextlib.contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    running = Terminal(*arguments)
    try:
        yield running
    finally:
        running.close()


def test_interrupt_leaves_the_text_and_exit_code_130() -> None:
    with terminal("--no-canvas") as running:
        running.read_until(b"on and on")
        running.process.send_signal(signal.SIGINT)
        code, errors = running.finish()
    assert code == 130
    assert errors == b"open slots: 0\n"
    assert running.output.endswith(b"\r\n")


def test_interrupt_gives_the_terminal_back() -> None:
    pytest.importorskip("rich")
    with terminal() as running:
        running.read_until(b"1 block")
        assert HIDE_CURSOR in running.output
        assert SHOW_CURSOR not in running.output
        running.process.send_signal(signal.SIGINT)
        code, errors = running.finish()
    assert code == 130
    assert errors == b"open slots: 0\n"
    assert running.output.rindex(SHOW_CURSOR) > running.output.rindex(HIDE_CURSOR)
    assert b"cancelled after" in running.output
