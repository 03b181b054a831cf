"""Autoregressive decoding, naively: what verified answers must be. Nothing of d2f_runtime in it."""

from collections.abc import Callable, Collection, Sequence

MASK = 99

NextToken = Callable[[tuple[int, ...]], int]
"""What the autoregressive model says after some tokens."""


def next_token_loop(
    prompt: Sequence[int], next_token: NextToken, max_new_tokens: int, eos_ids: Collection[int]
) -> list[int]:
    """Return the answer of plain autoregressive decoding."""
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        tokens.append(next_token(tuple(tokens)))
        if tokens[-1] in eos_ids:
            break
    return tokens[len(prompt) :]
