"""Where a chat's lines come from: a prompt with history and completion, by prompt_toolkit."""

from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from d2f_stream.core.errors import InvalidParams
from d2f_stream.terminal.system_errors import sentence_of

__all__ = ["ReadLine", "line_reader"]

ReadLine = Callable[[], Awaitable[str]]


def line_reader(history: Path, *, commands: Iterable[str]) -> ReadLine:
    """Return a reader of lines; Alt-Enter begins another line.

    Args:
        history: a file that holds earlier lines.
        commands: that are completed.

    Raises:
        InvalidParams: the history's folder cannot be written.
    """
    try:
        history.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        allowed = f"a file that can be written ({sentence_of(error)})"
        raise InvalidParams("history", str(history), allowed) from error
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        history=FileHistory(str(history)),
        key_bindings=keys,
        completer=WordCompleter(list(commands), sentence=True),
        complete_while_typing=False,
        prompt_continuation=_continuation,
    )
    return lambda: session.prompt_async(">>> ")


def _continuation(width: int, line_number: int, wrap_count: int) -> str:
    """Return what stands before a line that was begun, or before the rest of one that is long."""
    del line_number
    return " " * width if wrap_count else "... "
