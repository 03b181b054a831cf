"""Feed: the endless, seeded stream of training batches, and the place where it stands.

Every process of a training walks the same stream and takes its own rows of each batch, so that the
order of the data depends on neither the number of processes nor on where a run was stopped.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from d2f_export.distill.examples import ExampleFiles
from d2f_export.distill.sequences import Counts, Packing, Sequence
from d2f_stream.core.errors import InvalidRequest

__all__ = ["Batch", "BatchSource", "Feed"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of one forward.

    Attributes:
        tokens: [B, T] int64, prompt, answer, EOS padding.
        prompt_lens: [B] int64.
    """

    tokens: Tensor
    prompt_lens: Tensor


class BatchSource(Protocol):
    """Where a training's batches come from.

    Attributes:
        position: where the source stands, in a unit of its own; a run resumes from it.
    """

    position: int

    @property
    def counts(self) -> Counts:
        """What became of the examples so far."""
        ...

    def batches(self) -> Generator[Batch, None, None]:
        """Yield this process's batches for ever, from `position` on."""
        ...


class Feed:
    """Batches of `rows` sequences for each of `num_ranks` processes.

    Args:
        files: where examples come from.
        num_examples: how many there are.
        packing: makes sequences of them.
        seed: of the order.
        buffer: examples held while shuffling.
        rows: sequences of a batch.
        rank: which process this is.
        num_ranks: how many there are.

    Attributes:
        position: examples drawn so far, dropped ones included; a run resumes from it.
    """

    def __init__(
        self,
        files: ExampleFiles,
        num_examples: int,
        packing: Packing,
        *,
        seed: int,
        buffer: int,
        rows: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self._files = files
        self._num_examples = num_examples
        self._packing = packing
        self._seed = seed
        self._buffer = buffer
        self._rows = rows
        self._rank = rank
        self._num_ranks = num_ranks
        self.position = 0

    @property
    def counts(self) -> Counts:
        """What became of the examples so far."""
        return self._packing.counts

    def batches(self) -> Generator[Batch, None, None]:
        """Yield this process's batches for ever, from `position` on.

        Raises:
            InvalidRequest: no example of a whole pass fits.
        """
        sequences = self._sequences()
        while True:
            drawn = [next(sequences) for _ in range(self._rows * self._num_ranks)]
            mine = drawn[self._rank * self._rows : (self._rank + 1) * self._rows]
            yield Batch(
                torch.tensor([sequence.tokens for sequence in mine]),
                torch.tensor([sequence.prompt_len for sequence in mine]),
            )

    def _sequences(self) -> Iterator[Sequence]:
        unused = 0
        while True:
            epoch, skip = divmod(self.position, self._num_examples)
            for example in self._files.shuffled(self._seed, epoch, self._buffer, skip=skip):
                self.position += 1
                sequence = self._packing.pack(example)
                if sequence is not None:
                    unused = 0
                    yield sequence
                    continue
                unused += 1
                if unused >= self._num_examples:
                    raise InvalidRequest(
                        f"none of the {self._num_examples} examples fits into length "
                        f"{self._packing.length}; raise length, or set overlong to cut"
                    )
