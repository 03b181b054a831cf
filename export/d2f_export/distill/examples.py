"""Examples: lines of JSONL files with a prompt and its answer, read one by one.

A line holds `messages` (chat messages; the last, the assistant's, is the answer) or a prompt and an
answer. All lines are checked before a training starts, so that none stops it in its middle.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from d2f_stream.core.errors import InvalidRequest

__all__ = ["Example", "ExampleFiles", "Message"]

BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"  # what some editors put before UTF-8
HOW: Final = (
    'a line is {"messages": [..., {"role": "assistant", "content": ...}]} or '
    '{"prompt": ..., "answer": ...} (see prompt_field and answer_field)'
)


class Message(msgspec.Struct, frozen=True):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with its answer.

    Attributes:
        messages: the chat before the answer; one of the user's where the line has a prompt.
        prompt: the prompt of a line that has one, verbatim; None for a chat.
        answer: what is to be said next.
    """

    messages: tuple[Message, ...]
    prompt: str | None
    answer: str


class ExampleFiles:
    """The examples of one or several JSONL files; blank lines do not count.

    Args:
        paths: the files.
        prompt_field: name of the prompt in a line.
        answer_field: name of the answer in a line.
    """

    def __init__(
        self, paths: Sequence[str | Path], *, prompt_field: str, answer_field: str
    ) -> None:
        self._paths = [Path(path) for path in paths]
        self._prompt_field = prompt_field
        self._answer_field = answer_field
        self._decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])

    def check(self) -> int:
        """Read every line and return how many examples there are.

        Raises:
            InvalidRequest: a file cannot be read, or a line is no example; names file and line.
        """
        number = 0
        for path in self._paths:
            for line_number, line in _lines(path):
                self._parse(path, line_number, line)
                number += 1
        if number == 0:
            raise InvalidRequest(
                f"there is no example in {', '.join(map(str, self._paths))}; {HOW}"
            )
        return number

    def __iter__(self) -> Iterator[Example]:
        """Yield the examples in order."""
        for path in self._paths:
            for line_number, line in _lines(path):
                yield self._parse(path, line_number, line)

    def shuffled(self, seed: int, epoch: int, buffer: int, *, skip: int = 0) -> Iterator[Example]:
        """Yield the examples of an epoch in an order that is a function of (seed, epoch, buffer).

        Files come in a drawn order, and so do the lines within a window of `buffer` lines.

        Args:
            seed: of the order.
            epoch: number of the pass, from 0.
            buffer: lines held in memory.
            skip: examples at the beginning that are passed over, unparsed.
        """
        order = np.random.default_rng((seed, epoch))
        held: list[tuple[Path, int, bytes]] = []

        def drawn() -> Iterator[tuple[Path, int, bytes]]:
            for index in order.permutation(len(self._paths)):
                path = self._paths[index]
                for line_number, line in _lines(path):
                    held.append((path, line_number, line))
                    if len(held) > buffer:
                        yield _take(held, int(order.integers(len(held))))
            while held:
                yield _take(held, int(order.integers(len(held))))

        for number, (path, line_number, line) in enumerate(drawn()):
            if number >= skip:
                yield self._parse(path, line_number, line)

    def _parse(self, path: Path, line_number: int, line: bytes) -> Example:
        where = f"{path}:{line_number}"
        try:
            fields = self._decoder.decode(line)
            if "messages" in fields:
                messages = msgspec.json.decode(fields["messages"], type=list[Message])
                return _chat(where, messages)
            for name in (self._prompt_field, self._answer_field):
                if name not in fields:
                    raise InvalidRequest(f"{where} has no {name!r}; {HOW}")
            prompt = msgspec.json.decode(fields[self._prompt_field], type=str)
            answer = msgspec.json.decode(fields[self._answer_field], type=str)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            reason = (
                "not valid JSON" if type(error) is not msgspec.ValidationError else "no example"
            )
            raise InvalidRequest(f"{where} is {reason}: {error}; {HOW}") from error
        if not prompt.strip() or not answer.strip():
            empty = self._answer_field if prompt.strip() else self._prompt_field
            raise InvalidRequest(f"{where} has an empty {empty!r}; leave the line out")
        return Example((Message("user", prompt),), prompt, answer)


def _chat(where: str, messages: list[Message]) -> Example:
    if len(messages) < 2 or messages[-1].role != "assistant" or not messages[-1].content.strip():
        raise InvalidRequest(
            f"{where} has messages that do not end with an answer of the assistant; {HOW}"
        )
    return Example(tuple(messages[:-1]), None, messages[-1].content)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                if line.strip():
                    yield number, line
    except OSError as error:
        raise InvalidRequest(f"the data {path} cannot be read: {error.strerror}") from error


def _take(
    held: list[tuple[Path, int, bytes]], index: int
) -> tuple[Path, int, bytes]:  # the last one fills the gap
    held[index], held[-1] = held[-1], held[index]
    return held.pop()
