"""TokenLogprobs: how probable the model held each token of an answer when it decided on it.

A diffusion model has no probability of its answer as a whole. What there is: the probability of a
token at its position, given the canvas of the step in which it replaced the mask, under the
distribution that it was taken from (after temperature and top_p). With verified commits it is the
model's own next-token probability, given all tokens before.
"""

import math
from collections.abc import Sequence
from typing import Final

from d2f_runtime.decoding.blocks import Accepted, Edited
from d2f_runtime.decoding.window import Proposals, Window

__all__ = ["LEAST", "TokenLogprobs"]

LEAST: Final = -9999.0
"""Stands for the logarithm of 0, which JSON cannot hold; OpenAI's API writes the same."""


class TokenLogprobs:
    """The log-probabilities of one answer's tokens, kept up step by step.

    Args:
        num_prompt: length of the prompt, tokens.
    """

    def __init__(self, num_prompt: int) -> None:
        self._num_prompt = num_prompt
        self._values: dict[int, float] = {}  # by answer position

    def note(
        self, window: Window, proposals: Proposals, accepted: Sequence[Accepted | Edited]
    ) -> None:
        """Take what a step made of its window: see `BlockDecoder.apply`."""
        for at in range(window.num_to_cache - window.num_to_verify, window.num_to_cache):
            if window.tokens[at] != proposals.tokens[at]:
                break  # it is replaced, and among the accepted
            self._values[window.start + at - self._num_prompt] = _log(proposals.confidence[at])
        first = window.start - self._num_prompt
        for position, _ in accepted:
            if position - first < len(window.tokens):  # else it is a draft, to be verified
                self._values[position] = _log(proposals.confidence[position - first])

    def take(self, start: int, stop: int) -> tuple[float, ...]:
        """Return those of a committed block's answer positions, and forget them."""
        return tuple(self._values.pop(position) for position in range(start, stop))


def _log(probability: float) -> float:
    return math.log(min(probability, 1.0)) if probability > 0.0 else LEAST
