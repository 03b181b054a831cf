"""Protobuf's wire format, as far as rearranging a message's fields needs it: no schema, no copies.

What a field means is for the caller to know; groups, which proto3 has not, are refused.
https://protobuf.dev/programming-guides/encoding
"""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

__all__ = ["Field", "Part", "fields_of", "holding", "number", "number_in", "text"]

Part = bytes | memoryview

VARINT: Final = 0
LENGTH: Final = 2
FIXED: Final = {1: 8, 5: 4}  # bytes
MAX_VARINT: Final = 10  # bytes


class Field(NamedTuple):
    """One field of a message.

    Attributes:
        key: its number.
        value: what it holds; of integers, nothing.
        whole: it with its key and length, as it lies in the message.
    """

    key: int
    value: memoryview
    whole: memoryview


def fields_of(message: memoryview) -> Iterator[Field]:
    """Yield the fields of a message in order.

    Raises:
        ValueError: it is none, or cut off.
    """
    place, size = 0, len(message)
    while place < size:
        first = place
        tag, place = _varint(message, place)
        kind = tag & 7
        start = place
        if kind == LENGTH:
            length, start = _varint(message, place)
            place = start + length
        elif kind == VARINT:
            _, place = _varint(message, place)
            start = place
        elif kind in FIXED:
            place += FIXED[kind]
        else:
            raise ValueError(f"a field of the message has wire type {kind}, which is none")
        if place > size:
            raise ValueError(
                f"the message ends at byte {size}, within a field that ends at {place}"
            )
        yield Field(tag >> 3, message[start:place], message[first:place])


def text(key: int, value: str) -> bytes:
    """Return a field that holds a string."""
    return b"".join(holding(key, [value.encode()]))


def number(key: int, value: int) -> bytes:
    """Return a field that holds an integer from 0 on."""
    return _as_varint(key << 3 | VARINT) + _as_varint(value)


def number_in(field: Field) -> int:
    """Return what a field that holds an integer holds."""
    _, place = _varint(field.whole, 0)
    return _varint(field.whole, place)[0]


def holding(key: int, parts: Sequence[Part]) -> list[Part]:
    """Return the parts of a field whose value is the parts, one behind the other."""
    length = sum(len(part) for part in parts)
    return [_as_varint(key << 3 | LENGTH) + _as_varint(length), *parts]


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """Return an integer, and where it ends."""
    if place < len(message) and (first := message[place]) < 128:  # as nearly all are
        return first, place + 1
    value = 0
    for index, byte in enumerate(message[place : place + MAX_VARINT]):
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, place + index + 1
    raise ValueError(f"the message has no integer at byte {place}")


def _as_varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)
