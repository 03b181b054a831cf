"""What is measured of continuations: how likely the twin finds them, how much they repeat.

A low perplexity alone says little: text that repeats itself is easy to predict. The two are to be
read together, against the text's own continuation and the twin's samples.

Shapes: B texts, T tokens, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from d2f_runtime.models.transformer import Transformer

__all__ = ["Likelihood", "Repetition", "likelihood", "repetition"]

BATCH: Final = 64
NGRAM: Final = 4  # of "neural text degeneration" (Welleck et al., arXiv 1908.04319: seq-rep-4)


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Bits per token under a judge, over all tokens of all texts, and their standard error."""

    bits: float
    error: float

    @property
    def perplexity(self) -> float:
        """Two to the bits."""
        return float(2**self.bits)


@dataclass(frozen=True, slots=True)
class Repetition:
    """Means over texts.

    Attributes:
        repeated_4grams: share of 4-grams that occurred before in the text.
        distinct_2: share of 2-grams that are different ones.
        longest: tokens of the longest passage that occurs twice.
        doubled: share of tokens that equal the one before: what tokens accepted at once leave.
    """

    repeated_4grams: float
    distinct_2: float
    longest: float
    doubled: float


@torch.inference_mode()
def likelihood(
    judge: Transformer, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> Likelihood:
    """Score each text after its prompt, teacher-forced; EOS counts as any token."""
    device = judge.embed_tokens.weight.device
    nats: list[Tensor] = []
    for first in range(0, len(texts), BATCH):
        part = slice(first, first + BATCH)
        rows = [[*p, *t] for p, t in zip(prompts[part], texts[part], strict=True)]
        starts = torch.tensor([len(p) for p in prompts[part]])
        lengths = torch.tensor([*map(len, rows)])
        tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row)
        at = torch.arange(tokens.shape[1])[None]
        scored = (at >= starts[:, None]) & (at < lengths[:, None])
        nats.append(_nats(judge, tokens.to(device), scored.to(device)))
    total = torch.cat(nats)
    counts = torch.tensor([len(text) for text in texts], dtype=torch.float64)
    mean = float(total.sum() / counts.sum())
    # the standard error of a ratio of sums over texts
    error = float((total - mean * counts).square().sum().sqrt() / counts.sum())
    return Likelihood(mean / math.log(2), error / math.log(2))


def repetition(texts: Sequence[Sequence[int]]) -> Repetition:
    """Measure texts of at least 4 tokens each."""
    arrays = [np.asarray(text) for text in texts]
    return Repetition(
        repeated_4grams=float(np.mean([1 - _distinct(text, NGRAM) for text in arrays])),
        distinct_2=float(np.mean([_distinct(text, 2) for text in arrays])),
        longest=float(np.mean([_longest(text) for text in arrays])),
        doubled=float(np.mean([(text[1:] == text[:-1]).mean() for text in arrays])),
    )


def _nats(judge: Transformer, tokens: Tensor, scored: Tensor) -> Tensor:
    """Return [B] fp64 sums of -log p over the scored positions of [B, T] tokens."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    hidden, _ = judge(tokens, positions, None, causal=True)
    log_p = judge.logits(hidden[:, :-1]).float().log_softmax(dim=-1)  # [B, T - 1, V]
    nats = -log_p.gather(2, tokens[:, 1:, None])[..., 0]
    return (nats * scored[:, 1:]).double().sum(dim=1).cpu()


def _distinct(text: "np.ndarray[tuple[int], np.dtype[np.int64]]", size: int) -> float:
    grams = np.lib.stride_tricks.sliding_window_view(text, size)
    return len(np.unique(grams, axis=0)) / len(grams)


def _longest(text: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> int:
    """Return the length of the longest passage that occurs twice, overlapping or not."""
    longest = 0
    for shift in range(1, len(text)):
        equal = text[shift:] == text[:-shift]
        breaks = np.flatnonzero(np.concatenate([[True], ~equal, [True]]))
        longest = max(longest, int(np.diff(breaks).max()) - 1)
    return longest
