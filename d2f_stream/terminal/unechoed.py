"""Typing ahead: what is typed while something else is drawn is not drawn into it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["unechoed"]


@contextmanager
def unechoed() -> Iterator[None]:
    """Let the terminal show nothing of what is typed meanwhile; it is read later all the same.

    Ctrl-C is heard as ever. Without a terminal, or a POSIX one, nothing changes.
    """
    try:
        import termios
    except ImportError:
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    quiet = list(before)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
