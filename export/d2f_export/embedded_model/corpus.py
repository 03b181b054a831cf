"""Batches of tokenised word problems, drawn endlessly and seeded, by a pool of processes.

A sequence is the prompt, the answer, one EOS and EOS padding up to the length of its bucket; the
padding is an ordinary part of the answer. Shards are numbered: shard i is a function
of (seed, i), so a run resumes by the number of the next shard.
"""

import itertools
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from d2f_export.embedded_model.problems import problems

__all__ = ["EOS_ID", "MASK_ID", "Batch", "Corpus", "Shard"]

EOS_ID = 0
MASK_ID = 1
SHARD_SIZE = 4096
BUCKET = 64  # sequence lengths are multiples of this, so that few shapes occur
MIN_PADDING = 16  # at least so many EOS end a sequence

Split = Literal["train", "held_out"]
Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of one length.

    Attributes:
        tokens: [B, T] int64, prompt, answer, EOS padding.
        prompt_lens: [B] int64.
        shard: number of the first shard that is not used up; a run resumes from it.
    """

    tokens: Tokens
    prompt_lens: Tokens
    shard: int


@dataclass(frozen=True, slots=True)
class Shard:
    """SHARD_SIZE sequences of several lengths: id lists end to end."""

    number: int
    ids: npt.NDArray[np.int16]
    prompt_lens: Tokens
    total_lens: Tokens


@dataclass(frozen=True, slots=True)
class Corpus:
    """Where sequences come from.

    Attributes:
        tokenizer_path: a tokenizer.json.
        seed: of the problems.
        split: "train" or "held_out".
        num_workers: processes; 0 draws in this one.
    """

    tokenizer_path: Path
    seed: int
    split: Split = "train"
    num_workers: int = 0

    def batches(self, tokens_per_batch: int, *, first_shard: int = 0) -> Iterator[Batch]:
        """Yield batches of about `tokens_per_batch` tokens for ever."""
        pending: dict[int, list[tuple[Tokens, Tokens]]] = {}
        order = np.random.default_rng((self.seed, first_shard))
        for shard in self._shards(first_shard):
            full = []
            for length, rows, prompt_lens in _bucketed(shard):
                pending.setdefault(length, []).append((rows, prompt_lens))
                full += _take_full(pending, length, max(1, tokens_per_batch // length))
            order.shuffle(full)
            for rows, prompt_lens in full:
                yield Batch(rows, prompt_lens, shard.number + 1)

    def _shards(self, first: int) -> Iterator[Shard]:
        jobs = ((self.tokenizer_path, self.seed, self.split, i) for i in itertools.count(first))
        if self.num_workers == 0:
            yield from map(_make_shard, jobs)
            return
        context = multiprocessing.get_context("spawn")
        with context.Pool(self.num_workers) as pool:
            ahead = [pool.apply_async(_make_shard, (next(jobs),)) for _ in range(self.num_workers)]
            while True:  # a bounded look-ahead; Pool.imap would run away
                yield ahead.pop(0).get()
                ahead.append(pool.apply_async(_make_shard, (next(jobs),)))


def _make_shard(job: tuple[Path, int, Split, int]) -> Shard:
    from tokenizers import Tokenizer

    path, seed, split, number = job
    tokenizer = Tokenizer.from_file(str(path))
    drawn = problems(seed * 1_000_003 + number, split=split)
    sample = list(itertools.islice(drawn, SHARD_SIZE))
    prompts = tokenizer.encode_batch_fast([problem.question for problem in sample])
    answers = tokenizer.encode_batch_fast([problem.answer for problem in sample])
    rows = [p.ids + a.ids for p, a in zip(prompts, answers, strict=True)]
    return Shard(
        number,
        np.fromiter(itertools.chain.from_iterable(rows), np.int16),
        np.array([len(prompt.ids) for prompt in prompts]),
        np.array([len(row) for row in rows]),
    )


def _bucketed(shard: Shard) -> Iterator[tuple[int, Tokens, Tokens]]:
    """Yield (length, [N, length] tokens padded with EOS, [N] prompt lengths) per bucket."""
    starts = np.concatenate([[0], np.cumsum(shard.total_lens)[:-1]])
    lengths = -(-(shard.total_lens + MIN_PADDING) // BUCKET) * BUCKET
    for length in np.unique(lengths):
        chosen = np.flatnonzero(lengths == length)
        ahead = np.arange(length)[None, :]
        inside = ahead < shard.total_lens[chosen, None]
        index = np.where(inside, starts[chosen, None] + ahead, 0)
        tokens = np.where(inside, shard.ids[index].astype(np.int64), EOS_ID)
        yield int(length), tokens, shard.prompt_lens[chosen]


def _take_full(
    pending: dict[int, list[tuple[Tokens, Tokens]]], length: int, size: int
) -> list[tuple[Tokens, Tokens]]:
    if sum(len(rows) for rows, _ in pending[length]) < size:
        return []
    tokens = np.concatenate([rows for rows, _ in pending[length]])
    prompt_lens = np.concatenate([lens for _, lens in pending[length]])
    cut = len(tokens) // size * size
    pending[length] = [(tokens[cut:], prompt_lens[cut:])]
    return [(tokens[i : i + size], prompt_lens[i : i + size]) for i in range(0, cut, size)]
