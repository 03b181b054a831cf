"""Batches of pieces for the trainings: epochs over a fixed set, in a seeded order.

The same seam as the word problems' corpus, which is endless: sequences of one length with the
length of their prompts, and a number from which a stopped run goes on.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from d2f_export.corpus import Batch
from d2f_export.open_text.pieces import NUM_TOKENS, Pieces

__all__ = ["TextCorpus"]


@dataclass(frozen=True, slots=True)
class TextCorpus:
    """The pieces and the seed of their order."""

    pieces: Pieces
    seed: int

    def batches(self, tokens_per_batch: int, *, first_shard: int = 0) -> Iterator[Batch]:
        """Yield batches of `tokens_per_batch` tokens for ever; a shard is one batch.

        An epoch's pieces that fill no batch are left out of it.
        """
        size = self._size(tokens_per_batch)
        num_batches = self.num_batches(tokens_per_batch)
        for number in itertools.count(first_shard):
            epoch, index = divmod(number, num_batches)
            if index == 0 or number == first_shard:
                order = np.random.default_rng((self.seed, epoch)).permutation(len(self.pieces))
            chosen = order[index * size : (index + 1) * size]
            tokens = self.pieces.tokens[chosen].astype(np.int64)
            yield Batch(tokens, self.pieces.prompt_lens[chosen], number + 1)

    def num_batches(self, tokens_per_batch: int) -> int:
        """Return the number of batches of an epoch."""
        return len(self.pieces) // self._size(tokens_per_batch)

    def _size(self, tokens_per_batch: int) -> int:
        return max(1, min(tokens_per_batch // NUM_TOKENS, len(self.pieces)))
