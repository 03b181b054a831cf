"""Small text files of a model folder, from any system: JSON objects and plain text.

What a file cannot mean is one error that names it, whatever is wrong with it: a folder or a pipe of
that name, a name that no file system takes, bytes that are no text, nesting beyond any reader.
"""

import json
from pathlib import Path
from typing import Any, Final

from d2f_stream.core.errors import ModelDamaged

__all__ = ["holds_file", "read_bytes", "read_object", "read_text"]

MAX_BYTES: Final = 1 << 28  # many times the largest tokenizer.json
BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"  # what Windows' editors put before UTF-8


def holds_file(path: Path) -> bool:
    """Whether there is a file of that name; false, too, for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # longer than the file system's names, or not to be looked at
        return False


def read_bytes(path: Path) -> bytes | None:
    """Return a text file's bytes without its byte order mark; None where there is no such file.

    Raises:
        ModelDamaged: it is no regular file, cannot be read, or is larger than any such file.
    """
    try:
        if not path.is_file():
            if path.exists():
                raise ModelDamaged(f"{path} is not a file")
            return None
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ModelDamaged(f"{path} has {size} bytes, but at most {MAX_BYTES} are read")
        return path.read_bytes().removeprefix(BYTE_ORDER_MARK)
    except (OSError, ValueError) as error:
        raise ModelDamaged(f"{path} cannot be read: {error!s:.300}") from error


def read_text(path: Path) -> str | None:
    """Return a UTF-8 file's text, line ends as newlines; None where there is no such file.

    Raises:
        ModelDamaged: see `read_bytes`, or it is not UTF-8.
    """
    content = read_bytes(path)
    if content is None:
        return None
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ModelDamaged(f"{path} is not UTF-8: {error}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_object(path: Path) -> dict[str, Any] | None:
    """Return a JSON file's object; None where there is no such file.

    Raises:
        ModelDamaged: see `read_bytes`, or it holds no JSON object.
    """
    content = read_bytes(path)
    if content is None:
        return None
    try:
        values = json.loads(content)
    except RecursionError as error:
        raise ModelDamaged(f"{path} is not valid JSON: it is nested too deeply") from error
    except ValueError as error:
        raise ModelDamaged(f"{path} is not valid JSON: {error!s:.300}") from error
    if not isinstance(values, dict):
        raise ModelDamaged(f"{path} holds no JSON object")
    return values
