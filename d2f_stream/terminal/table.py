"""Table: rows of text in columns, within the width of a terminal. Pure, save `width_here`."""

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Final

__all__ = ["table", "width_here", "wrapped"]

GAP: Final = "  "
LEAST: Final = 12  # characters that the second of two columns is narrowed to, words or not


def width_here() -> int | None:
    """Return the columns of the terminal that is written to, or what COLUMNS says; else None."""
    is_bounded = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return shutil.get_terminal_size().columns if is_bounded else None


def table(rows: Sequence[tuple[str, ...]], *, width: int | None = None) -> str:
    """Return the rows in columns, the widest ones wrapped between words where they do not fit.

    Where that is not enough, and there are more than two, each row is a line with its first cell,
    and the others below with the names that the first row gives them.

    Args:
        rows: all of one length; the first column is never wrapped.
        width: columns of the terminal; None is any number.
    """
    widths = [max(1, *map(len, column)) for column in zip(*rows, strict=True)]
    words = [max(map(_longest_word, column)) for column in zip(*rows, strict=True)]
    least = words if len(words) > 2 else [LEAST] * len(words)
    if width is not None and not _narrow(widths, least, width):
        return "\n".join(_stacked(rows[0], row, width) for row in rows[1:])
    return "\n".join(_line(row, widths) for row in rows)


def wrapped(text: str, *, width: int | None = None, indent: str = "") -> str:
    """Return a text in lines of at most the width, those after the first indented."""
    if width is None:
        return text
    return "\n".join(
        line
        for paragraph in text.splitlines()
        for line in textwrap.wrap(
            paragraph, width, subsequent_indent=indent, break_on_hyphens=False
        )
        or [""]
    )


def _narrow(widths: list[int], least: Sequence[int], width: int) -> bool:
    """Take from the widest columns until they fit; False where they cannot."""
    while sum(widths) + len(GAP) * (len(widths) - 1) > width:
        wide = [column for column in range(1, len(widths)) if widths[column] > least[column]]
        if not wide:
            return False
        widths[max(wide, key=lambda column: widths[column])] -= 1
    return True


def _longest_word(cell: str) -> int:
    return max(map(len, cell.split()), default=1)


def _line(row: tuple[str, ...], widths: Sequence[int]) -> str:
    cells = [
        textwrap.wrap(cell, size, break_on_hyphens=False) or [""]  # a name stays a name
        for cell, size in zip(row, widths, strict=True)
    ]
    lines = [
        GAP.join(
            (cell[number] if number < len(cell) else "").ljust(size)
            for cell, size in zip(cells, widths, strict=True)
        )
        for number in range(max(map(len, cells)))
    ]
    return "\n".join(line.rstrip() for line in lines)


def _stacked(names: tuple[str, ...], row: tuple[str, ...], width: int) -> str:
    told = zip(names[1:], row[1:], strict=True)
    rest = ", ".join(f"{name} {cell}" for name, cell in told if cell != "-")
    return wrapped(f"{row[0]}\n{GAP}{rest}", width=width, indent=GAP)
