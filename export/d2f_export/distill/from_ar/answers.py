"""Answers: prompts and answers as token ids in flat arrays, the form that training reads."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from d2f_stream.core.errors import InvalidRequest

__all__ = ["Answers"]


@dataclass(frozen=True, slots=True)
class Answers:
    """E examples, one after the other.

    Attributes:
        tokens: of all examples, prompt then answer with the token that ends it.
        lengths: [E] tokens of each example.
        prompts: [E] tokens of each prompt.
        begins: bool, of each token whether decoding with a draft began a window there; nowhere in
            answers that no draft has decoded.
    """

    tokens: NDArray[np.uint32]
    lengths: NDArray[np.int64]
    prompts: NDArray[np.int64]
    begins: NDArray[np.bool_]

    @classmethod
    def of(cls, examples: Iterable[tuple[list[int], list[int]]]) -> "Answers":
        """Join (prompt, answer) pairs."""
        pairs = list(examples)
        joined = [np.asarray([*prompt, *answer], dtype=np.uint32) for prompt, answer in pairs]
        return cls(
            np.concatenate(joined) if joined else np.empty(0, np.uint32),
            np.asarray([len(row) for row in joined], dtype=np.int64),
            np.asarray([len(prompt) for prompt, _ in pairs], dtype=np.int64),
            np.zeros(sum(len(row) for row in joined), np.bool_),
        )

    @classmethod
    def read(cls, path: Path) -> "Answers":
        """Read a file of `write`.

        Raises:
            InvalidRequest: it is missing or no such file.
        """
        try:
            with np.load(path) as stored:
                tokens = stored["tokens"].astype(np.uint32)
                begins = np.zeros(len(tokens), np.bool_)
                if "begins" in stored:
                    begins = np.unpackbits(stored["begins"], count=len(tokens)).astype(np.bool_)
                found = cls(
                    tokens,
                    stored["lengths"].astype(np.int64),
                    stored["prompts"].astype(np.int64),
                    begins,
                )
        except (OSError, ValueError, KeyError) as error:
            raise InvalidRequest(f"{path} is no file of answers: {error}") from error
        if found.lengths.sum() != len(found.tokens) or len(found.lengths) != len(found.prompts):
            raise InvalidRequest(f"{path} is damaged: its lengths do not add up to its tokens")
        if (found.prompts >= found.lengths).any() or (found.prompts < 1).any():
            raise InvalidRequest(f"{path} has an example without a prompt or without an answer")
        return found

    def write(self, path: Path) -> None:
        """Write the file whole, in the smallest integers that hold it."""
        small = np.uint16 if self.tokens.max(initial=0) < 1 << 16 else np.uint32
        partial = path.with_name(f".{path.name}")
        with partial.open("wb") as file:
            np.savez(
                file,
                tokens=self.tokens.astype(small),
                lengths=self.lengths.astype(np.uint32),
                prompts=self.prompts.astype(np.uint32),
                begins=np.packbits(self.begins),
            )
        os.replace(partial, path)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_answer_tokens(self) -> int:
        """Tokens of all answers, ends included."""
        return int(self.lengths.sum() - self.prompts.sum())

    @property
    def starts(self) -> NDArray[np.int64]:
        """[E] where each example begins in `tokens`."""
        return np.cumsum(self.lengths) - self.lengths

    def select(self, indices: NDArray[np.int64]) -> "Answers":
        """Return some of the examples, in the order given."""
        starts = self.starts
        parts = [slice(starts[i], starts[i] + self.lengths[i]) for i in indices]
        return Answers(
            np.concatenate([self.tokens[part] for part in parts] or [self.tokens[:0]]),
            self.lengths[indices],
            self.prompts[indices],
            np.concatenate([self.begins[part] for part in parts] or [self.begins[:0]]),
        )

    @classmethod
    def joined(cls, parts: "list[Answers]") -> "Answers":
        """Put several one after the other."""
        return cls(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.lengths for part in parts]),
            np.concatenate([part.prompts for part in parts]),
            np.concatenate([part.begins for part in parts]),
        )
