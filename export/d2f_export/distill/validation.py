"""Validation: held-out prompts decoded by the student as it is, scored and counted.

The answers come from the runtime's own block decoder over the live weights: no copy of them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from d2f_export.distill.base import Base
from d2f_export.distill.examples import Example
from d2f_export.distill.sequences import encode_prompt
from d2f_export.distill.settings import DistillSettings
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.evaluation.answers import Answer, decode_all
from d2f_runtime.models.transformer import Transformer
from d2f_stream.core.errors import InvalidRequest
from d2f_stream.core.params import GenerationParams

__all__ = ["Score", "Validation", "is_right"]


@dataclass(frozen=True, slots=True)
class Score:
    """Counts over some answers; scores of disjoint parts add up.

    Attributes:
        num_answers: how many were decoded.
        num_right: of these, the right ones.
        num_tokens: useful ones.
        num_steps: backend calls, summed over answers.
    """

    num_answers: int = 0
    num_right: int = 0
    num_tokens: int = 0
    num_steps: int = 0

    def __add__(self, other: "Score") -> "Score":
        return Score(
            self.num_answers + other.num_answers,
            self.num_right + other.num_right,
            self.num_tokens + other.num_tokens,
            self.num_steps + other.num_steps,
        )

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.num_right / max(1, self.num_answers)

    @property
    def tokens_per_step(self) -> float:
        """Useful tokens over steps, both summed over all answers."""
        return self.num_tokens / max(1, self.num_steps)

    @property
    def rank(self) -> tuple[float, float]:
        """What a better student has more of: accuracy, then tokens per step."""
        return self.accuracy, self.tokens_per_step


class Validation:
    """Decodes the same prompts each time.

    Args:
        base: of the student.
        examples: all of them; this process takes its share.
        settings: lengths, and what counts as right.
        rank: which process this is.
        num_ranks: how many there are.

    Raises:
        InvalidRequest: prompt and answer are longer than the model holds, or an expected answer
            does not match the pattern.
    """

    def __init__(
        self,
        base: Base,
        examples: Sequence[Example],
        settings: DistillSettings,
        *,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self._base = base
        self._settings = settings
        self._examples = examples[rank::num_ranks]
        self._prompts = [
            encode_prompt(base.codec, example, chat_template=settings.chat_template)
            for example in self._examples
        ]
        pattern = settings.score_pattern
        for number, example in enumerate(examples, 1):
            if pattern is not None and not re.search(pattern, example.answer):
                raise InvalidRequest(
                    f"the answer of validation example {number} does not match score_pattern "
                    f"{pattern!r}, so that nothing could be right; change one of the two"
                )
        self._params = GenerationParams(
            max_new_tokens=settings.validation_tokens, block_size=settings.validation_block_size
        )
        self._capacity = settings.validation_tokens + settings.validation_block_size
        self._capacity += max(map(len, self._prompts), default=0)
        if self._capacity > base.config.max_len:
            raise InvalidRequest(
                f"a validation prompt and its answer take {self._capacity} tokens, but the model "
                f"holds {base.config.max_len}; lower validation_tokens "
                f"(now {settings.validation_tokens})"
            )

    @property
    def every(self) -> int:
        """Steps from one to the next."""
        return self._settings.validate_every

    def run(self, model: Transformer) -> Score:
        """Decode this process's prompts with the model and score the answers."""
        was_training = model.training
        model.eval()
        weight = model.embed_tokens.weight
        backend = TorchBackend(
            model,
            name="student",
            device=str(weight.device),
            dtype=weight.dtype,
            max_tokens=self._settings.validation_rows * self._capacity,
            runner="plain",
        )
        try:
            with torch.autocast(weight.device.type, enabled=False):
                rows = self._settings.validation_rows
                answers = decode_all(backend, self._prompts, self._params, rows=rows)
        finally:
            backend.close()
            model.train(was_training)
        return sum(map(self._scored, self._examples, answers), start=Score())

    def _scored(self, example: Example, answer: Answer) -> Score:
        text = self._base.codec.decode(answer.tokens)
        right = is_right(
            text, example.answer, score=self._settings.score, pattern=self._settings.score_pattern
        )
        return Score(1, int(right), answer.num_useful, answer.num_steps)


def is_right(
    text: str,
    expected: str,
    *,
    score: Literal["exact", "contains", "regex"],
    pattern: str | None = None,
) -> bool:
    """Whether a text counts as the expected one.

    Args:
        text: what was decoded.
        expected: the data's answer.
        score: "exact" compares the stripped texts; "contains" looks for the expected one in the
            other; "regex" compares the last match of the pattern in both: its first group where it
            has one.
        pattern: for "regex". An answer without a match is wrong.
    """
    if score == "exact":
        return text.strip() == expected.strip()
    if score == "contains":
        return expected.strip() in text
    found = [list(re.finditer(pattern or "", given)) for given in (text, expected)]
    if not all(found):
        return False
    left, right = (m[-1].group(1 if m[-1].re.groups else 0) for m in found)
    return bool(left == right)
