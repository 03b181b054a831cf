"""What is typed while a model loads, in a terminal of its own: not shown, and read later."""

import os
import sys

import pytest

from d2f_stream.terminal.unechoed import unechoed

pty = pytest.importorskip("pty", reason="needs a POSIX terminal")


def test_what_is_typed_meanwhile_is_not_shown_and_read_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keyboard, terminal = pty.openpty()
    with open(terminal) as stdin, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", stdin)
        with unechoed():
            os.write(keyboard, b"ahead\n")
            assert stdin.readline() == "ahead\n"
        os.write(keyboard, b"after\n")
        assert stdin.readline() == "after\n"
    assert os.read(keyboard, 100) == b"after\r\n"
    os.close(keyboard)


def test_without_a_terminal_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with open(reader) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with unechoed():
            os.write(writer, b"a\n")
        assert stdin.readline() == "a\n"
    os.close(writer)
