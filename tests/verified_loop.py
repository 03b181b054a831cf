"""Verified decoding, naively: the oracle of the decoder's tests with `commit="verify"`.

One token list and one number, how much of it the autoregressive model has said; everything else is
found anew in every step. Shares nothing with d2f_runtime.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

MASK = 99

NextToken = Callable[[tuple[int, ...]], int]
"""What the autoregressive model says after some tokens."""

Draft = Callable[[tuple[int, ...], int], tuple[int, float]]
"""(visible tokens, position) -> token and confidence of a draft row."""


@dataclass(frozen=True)
class VerifiedSettings:
    block_size: int
    max_new_tokens: int
    add_threshold: float
    confidence_threshold: float
    max_active_blocks: int | None
    eos_ids: Collection[int]


@dataclass(frozen=True)
class VerifiedStep:
    start: int  # of the window
    tokens: list[int]
    num_clean: int  # leading rows that run causally
    num_final: int  # canvas positions that are final after the step


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


def verified_loop(
    prompt: Sequence[int], next_token: NextToken, draft: Draft, settings: VerifiedSettings
) -> tuple[list[int], list[VerifiedStep]]:
    """Return the answer and what each step ran."""
    x, first = list(prompt), len(prompt)
    limit, size = first + settings.max_new_tokens, settings.block_size
    final = first
    steps: list[VerifiedStep] = []

    def block_end(position: int) -> int:
        return min(first + ((position - first) // size + 1) * size, limit)

    def has_eos(stop: int) -> bool:
        return any(token in settings.eos_ids for token in x[first:stop])

    start = 0
    while True:
        if has_eos(final) or final == limit:
            answer = x[first:final]
            ends = [at + 1 for at, token in enumerate(answer) if token in settings.eos_ids]
            return answer[: min(ends, default=len(answer))], steps
        starts = list(range(first, len(x), size))
        blocks = [(at, block_end(at)) for at in starts]
        if len(x) < limit and not has_eos(len(x)) and may_append(x, blocks, final, settings):
            x += [MASK] * (block_end(len(x)) - len(x))
        seen = list(x)
        clean = seen.index(MASK) if MASK in seen else len(seen)
        wrong = next(
            (at for at in range(final, clean) if next_token(tuple(seen[:at])) != seen[at]), None
        )
        at = clean if wrong is None else wrong
        if wrong is not None:
            x = x[: block_end(wrong)]
            x[wrong:] = [MASK] * (len(x) - wrong)
        final = at
        if at < len(x):
            x[at] = next_token(tuple(seen[:at]))
            final = at + 1
        if wrong is None:
            for begin in range(first, len(x), size):
                end = block_end(begin)
                for position in range(begin, end):
                    if x[position] == MASK:
                        token, confidence = draft(tuple(seen[:end]), position)
                        if confidence > settings.confidence_threshold:
                            x[position] = token
                if has_eos(end):
                    x = x[:end]
                    break
        steps.append(VerifiedStep(start, seen[start:], clean - start, final))
        start = at


def may_append(
    x: list[int], blocks: list[tuple[int, int]], final: int, settings: VerifiedSettings
) -> bool:
    if not blocks or final >= blocks[-1][1]:
        return True
    begin, end = blocks[-1]
    filled = sum(token != MASK for token in x[begin:end]) / (end - begin)
    unfilled = sum(MASK in x[begin:end] for begin, end in blocks)
    bound = settings.max_active_blocks
    return filled >= settings.add_threshold and (bound is None or unfilled < bound)
