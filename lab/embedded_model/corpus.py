"""Batches of tokenised word problems, drawn endlessly and seeded, by a pool of processes.

A sequence is the prompt, the answer, one EOS and EOS padding up to the length of its bucket; the
padding is an ordinary part of the answer. Shards are numbered: shard i is a function of (seed, i),
so a run resumes by the number of the next shard.
"""

import itertools
import multiprocessing
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from d2f_export.distill.feed import Batch
from d2f_export.distill.sequences import Counts
from lab.embedded_model.problems import problems

__all__ = ["EOS_ID", "MASK_ID", "Corpus", "Shard"]

EOS_ID = 0
MASK_ID = 1
SHARD_SIZE = 4096
BUCKET = 64  # sequence lengths are multiples of this, so that few shapes occur
MIN_PADDING = 16  # at least so many EOS end a sequence

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Shard:
    """SHARD_SIZE sequences of several lengths: id lists end to end."""

    number: int
    ids: npt.NDArray[np.int16]
    prompt_lens: Tokens
    total_lens: Tokens


class Corpus:
    """Batches of problems, for one process.

    Args:
        tokenizer_path: a tokenizer.json.
        seed: of the problems.
        tokens_per_batch: about so many, padding included.
        num_workers: processes that draw; 0 draws in this one.
        position: number of the first shard that is not used up.
        counts: of the problems so far.

    Attributes:
        position: as given, kept up to date; a run resumes from it.
        counts: as given, kept up to date.
    """

    def __init__(
        self,
        tokenizer_path: Path,
        seed: int,
        *,
        tokens_per_batch: int,
        num_workers: int = 0,
        position: int = 0,
        counts: Counts | None = None,
    ) -> None:
        self._tokenizer_path = tokenizer_path
        self._seed = seed
        self._tokens_per_batch = tokens_per_batch
        self._num_workers = num_workers
        self.position = position
        self.counts = counts or Counts()

    def batches(self) -> Generator[Batch, None, None]:
        """Yield batches for ever, from `position` on."""
        first = self.position
        pending: dict[int, list[tuple[Tokens, Tokens]]] = {}
        order = np.random.default_rng((self._seed, first))
        for shard in self._shards(first):
            full = []
            for length, rows, prompt_lens in _bucketed(shard):
                pending.setdefault(length, []).append((rows, prompt_lens))
                full += _take_full(pending, length, max(1, self._tokens_per_batch // length))
            order.shuffle(full)
            for rows, prompt_lens in full:
                self.position = shard.number + 1
                self.counts.used += len(rows)
                yield Batch(torch.from_numpy(rows), torch.from_numpy(prompt_lens))

    def _shards(self, first: int) -> Iterator[Shard]:
        jobs = ((self._tokenizer_path, self._seed, i, SHARD_SIZE) for i in itertools.count(first))
        if self._num_workers == 0:
            yield from map(_make_shard, jobs)
            return
        context = multiprocessing.get_context("spawn")
        with context.Pool(self._num_workers) as pool:
            ahead = [pool.apply_async(_make_shard, (next(jobs),)) for _ in range(self._num_workers)]
            while True:  # a bounded look-ahead; Pool.imap would run away
                yield ahead.pop(0).get()
                ahead.append(pool.apply_async(_make_shard, (next(jobs),)))


def _make_shard(job: tuple[Path, int, int, int]) -> Shard:
    from tokenizers import Tokenizer

    path, seed, number, size = job
    tokenizer = Tokenizer.from_file(str(path))
    drawn = problems(seed * 1_000_003 + number, split="train")
    sample = list(itertools.islice(drawn, size))
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
