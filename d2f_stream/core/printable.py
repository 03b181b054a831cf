"""Text of strangers on one short line: for logs, errors, and whatever a terminal may show. Pure."""

import re
from typing import Final

__all__ = ["is_encodable", "printable", "shown"]

UNPRINTABLE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line separators, changes of direction, and halves of characters."""


def printable(text: object, limit: int = 300) -> str:
    r"""Return the text with control characters written as \xNN, cut to `limit` characters."""
    whole = str(text)
    shown = UNPRINTABLE.sub(_escaped, whole[:limit])
    return shown[:limit] + ("..." if len(whole) > limit else "")


def is_encodable(text: str) -> bool:
    """Whether UTF-8 can hold a text: it cannot where half of a surrogate pair stands alone."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object, limit: int = 200) -> str:
    """Return a value as an error quotes it, cut to `limit` characters."""
    try:
        return repr(value)[:limit]
    except ValueError:  # Python writes no integer of more than some thousand digits
        return f"a value of the type {type(value).__name__} that is too long to be shown"


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
