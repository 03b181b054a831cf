"""Header: a cursor over the bytes of a GGUF file's head that never believes a length it reads.

Files come from anywhere. Every length is compared with what is left of the file before anything is
read or allocated for it, and heads that no model needs (GGUF's own limits are 2^64 of everything)
are refused, so that time and memory stay small whatever the bytes say. Layout: docs/gguf.md of
ggml, versions 2 and 3, little-endian.
"""

import struct
from pathlib import Path
from typing import BinaryIO, Final

from d2f_stream.core.errors import ModelDamaged, UnsupportedModel

__all__ = ["Header", "Value"]

Value = bool | int | float | str | tuple[bool, ...] | tuple[int | float, ...] | tuple[str, ...]
"""What a key of a GGUF file can hold; arrays of arrays, which nobody writes, are refused."""

MAX_BYTES: Final = 1 << 27  # of the head; Llama 3's, with 128,256 tokens, has 8 MiB
MAX_ITEMS: Final = 1 << 22  # of all arrays; Gemma 3's, with 262,144 tokens, have 1.3 million

_UINT8, _BOOL, _STRING, _ARRAY = 0, 7, 8, 9
_SCALARS: Final = {
    _UINT8: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?",
    10: "Q", 11: "q", 12: "d",
}  # fmt: skip


class Header:
    """Reads a file's head from front to back.

    Args:
        file: opened for reading in binary, at its beginning.
        path: for errors.
        size: of the file, bytes.

    Raises:
        ModelDamaged: by every method, where the bytes are not what the format asks for.
    """

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.path = path
        self.position = 0
        self._file = file
        self._size = size
        self._items_left = MAX_ITEMS

    def numbers(self, form: str, what: str) -> tuple[int, ...]:
        """Read numbers of a `struct` form without a byte order."""
        read: tuple[int, ...] = struct.unpack(
            "<" + form, self._take(struct.calcsize("<" + form), what)
        )
        return read

    def text(self, what: str) -> str:
        """Read a string: its length in eight bytes, then UTF-8."""
        (length,) = self.numbers("Q", what)
        encoded = self._take(length, what)
        try:
            return encoded.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelDamaged(
                f"{self.path}: {what} is not UTF-8 ({error}); fetch it again"
            ) from error

    def count(self, what: str, *, bytes_each: int) -> int:
        """Read how many things follow, each of at least so many bytes."""
        (number,) = self.numbers("Q", what)
        self._require(number * bytes_each, f"{number} {what}")
        return number

    def value(self, key: str) -> Value:
        """Read the type and the value of a key."""
        (kind,) = self.numbers("I", key)
        if kind == _STRING:
            return self.text(key)
        if kind == _ARRAY:
            return self._array(key)
        (number,) = self.numbers(self._form(kind, key), key)
        return number

    def _array(self, key: str) -> Value:
        (kind,) = self.numbers("I", key)
        form = "" if kind == _STRING else self._form(kind, key)
        length = self.count(
            f"items of {key}", bytes_each=8 if kind == _STRING else struct.calcsize(form)
        )
        self._items_left -= length
        if self._items_left < 0:
            raise UnsupportedModel(
                f"{self.path}: {key} has {length} items, with the arrays before it more "
                f"than the {MAX_ITEMS} that are read here"
            )
        if kind == _STRING:
            return tuple(self.text(key) for _ in range(length))
        return self.numbers(f"{length}{form}", key)

    def _form(self, kind: int, key: str) -> str:
        if kind == _ARRAY:
            raise UnsupportedModel(
                f"{self.path}: {key} is an array of arrays, which is not read here"
            )
        if kind not in _SCALARS:
            raise ModelDamaged(
                f"{self.path}: {key} has the value type {kind}, but GGUF knows 0 to 12; fetch the "
                "file again"
            )
        return _SCALARS[kind]

    def _take(self, length: int, what: str) -> bytes:
        self._require(length, what)
        read = self._file.read(length)
        if len(read) < length:
            raise ModelDamaged(f"{self.path} became shorter while it was read; fetch it again")
        self.position += length
        return read

    def _require(self, length: int, what: str) -> None:
        """Refuse a length that reaches beyond the file, or beyond any model's head."""
        end = self.position + length
        if end > self._size:
            raise ModelDamaged(
                f"{self.path} has {self._size} bytes, but {what} would end at byte {end}; the file "
                "is cut off or damaged, fetch it again"
            )
        if end > MAX_BYTES:
            raise UnsupportedModel(
                f"{self.path}: {what} would end at byte {end}, but names and metadata of more than "
                f"{MAX_BYTES} bytes are not read here"
            )
