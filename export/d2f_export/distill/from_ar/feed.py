"""Feed: packed batches, each a pure function of the seed and its number.

So the place in the data is one integer, and a run goes on anywhere. A row holds whole examples one
after the other (clean), and noisy copies of their answers until it is full.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from d2f_export.distill.from_ar.answers import Answers
from d2f_export.distill.from_ar.noise import Noise

__all__ = ["Batch", "Feed", "Stage"]

BLOCK_WEIGHT: Final = 0.7  # of a block's loss against that of the block before it
PLACE_WEIGHT: Final = 0.85  # the same of a token: one counts where all before it are right
POOL: Final = 512  # examples that are packed into rows together

Batch = dict[str, Tensor]
"""[R, C] clean, clean_position, clean_doc; [R, N] noisy, noisy_position, doc_start, window_start,
window, block; [P] student_row, teacher_row (places in the flattened halves: the first learns what
the second predicts), weight. Documents and windows have numbers in their row; padding has -1."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Which block sizes are drawn, and how often.

    Attributes:
        sizes: tokens.
        shares: of the noisy copies; they add up to 1.
    """

    sizes: tuple[int, ...]
    shares: tuple[float, ...]


class Feed(Dataset[Batch]):
    """Batches by number.

    Args:
        answers: what to learn from; none longer than `clean_length`.
        rows: of a batch.
        clean_length: C.
        noisy_length: N.
        mask_id: the id that stands for a mask.
        seed: of order and noise.
        stages: (first batch, stage), rising.
        noise: of the answers.
        pad_to: the number of rows that learn is made a multiple of it, with weight 0.
        rank: of this process; each of `num_ranks` takes every num_ranks-th row.
        num_ranks: processes.
    """

    def __init__(
        self,
        answers: Answers,
        *,
        rows: int,
        clean_length: int,
        noisy_length: int,
        mask_id: int,
        seed: int,
        stages: Sequence[tuple[int, Stage]],
        pad_to: int = 1,
        noise: Noise,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self._pad_to, self._noise = pad_to, noise
        self._answers, self._starts = answers, answers.starts
        self._rows, self._clean, self._noisy = rows, clean_length, noisy_length
        self._mask_id, self._seed, self._stages = mask_id, seed, stages
        self._rank, self._num_ranks = rank, num_ranks
        self._epoch = -1
        self._packed: list[list[int]] = []

    def __len__(self) -> int:
        return 1 << 40  # batches never end

    def __getitem__(self, number: int) -> Batch:
        stage = [stage for first, stage in self._stages if first <= number][-1]
        parts = [
            self._row((number * self._rows + row) * self._num_ranks + self._rank, stage)
            for row in range(self._rows)
        ]
        arrays = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
        arrays |= self._learning(arrays.pop("target"), arrays.pop("weight"))
        return {name: torch.from_numpy(values) for name, values in arrays.items()}

    def _learning(
        self, target: NDArray[Any], weight: NDArray[Any]
    ) -> dict[str, NDArray[np.generic]]:
        """Return the rows that learn, as places in the flattened batch."""
        row, place = (target >= 0).nonzero()
        padding = (0, -len(row) % self._pad_to)
        return {
            "student_row": np.pad(row * self._noisy + place, padding),
            "teacher_row": np.pad(row * self._clean + target[row, place], padding),
            "weight": np.pad(weight[row, place], padding),
        }

    def _examples(self, row: int) -> list[int]:
        """Return the examples of a row, counted over all epochs."""
        if self._epoch < 0:
            self._pack(0)
        per_epoch = max(1, int(self._answers.lengths.sum() / self._clean * 0.9))
        epoch, index = divmod(row, per_epoch)
        if epoch != self._epoch:
            self._pack(epoch)
        return self._packed[index % len(self._packed)]

    def _pack(self, epoch: int) -> None:
        """Fill rows with the examples in random order, the longest of a pool first."""
        random = np.random.default_rng((self._seed, 1, epoch))
        order = random.permutation(len(self._answers))
        lengths = self._answers.lengths
        packed: list[list[int]] = []
        for first in range(0, len(order), POOL):
            pool = order[first : first + POOL]
            rows: list[list[int]] = []
            room: list[int] = []
            for example in pool[np.argsort(-lengths[pool], kind="stable")]:
                size = int(lengths[example])
                place = next((i for i, left in enumerate(room) if left >= size), -1)
                if place < 0:
                    rows.append([])
                    room.append(self._clean)
                rows[place].append(int(example))
                room[place] -= size
            packed += rows
        self._packed = [packed[i] for i in random.permutation(len(packed))]
        self._epoch = epoch

    def _row(self, row: int, stage: Stage) -> dict[str, NDArray[np.generic]]:
        random = np.random.default_rng((self._seed, 2, row))
        examples = self._examples(row)
        clean = _Clean(self._answers, self._starts, examples, self._clean)
        noisy = _Noisy(self._noisy)
        window = 0
        while noisy.filled < self._noisy:
            for doc in random.permutation(len(examples)):
                block_size = int(random.choice(stage.sizes, p=stage.shares))
                window = self._copy(random, clean, noisy, int(doc), block_size, window)
                if noisy.filled == self._noisy:
                    break
        return clean.arrays() | noisy.arrays()

    def _copy(
        self,
        random: np.random.Generator,
        clean: "_Clean",
        noisy: "_Noisy",
        doc: int,
        block_size: int,
        window: int,
    ) -> int:
        """Add one noisy copy of a document's answer; cut where the row is full."""
        prompt, start, stop = clean.prompts[doc], clean.starts[doc], clean.stops[doc]
        first = start + prompt
        begins = clean.begins[first:stop].nonzero()[0]
        if len(begins):
            noise = self._noise.behind(begins, stop - first, block_size)
        else:
            noise = self._noise.draw(random, stop - first, block_size)
        place = (first + noise.place).astype(np.int32)
        next_block = np.append(noise.block[1:], 0)
        in_block = noise.place - noise.window_start - noise.block * block_size
        noisy.add(
            noisy=np.where(noise.masked, self._mask_id, clean.tokens[place]),
            noisy_position=place - start,
            doc_start=np.full(len(place), start),
            window_start=first + noise.window_start,
            window=window + noise.window,
            block=noise.block,
            target=np.where(noise.learns, place, -1),
            weight=np.where(noise.learns, BLOCK_WEIGHT**next_block * PLACE_WEIGHT**in_block, 0.0),
        )
        return window + int(noise.window[-1]) + 1


class _Clean:
    """The clean half of a row."""

    def __init__(
        self,
        answers: Answers,
        starts: NDArray[np.int64],
        examples: list[int],
        length: int,
    ) -> None:
        self.tokens = np.zeros(length, np.int64)
        self.begins = np.zeros(length, np.bool_)
        self._position = np.zeros(length, np.int64)
        self._doc = np.full(length, -1, np.int32)
        self.starts: list[int] = []
        self.stops: list[int] = []
        self.prompts: list[int] = []
        place = 0
        for number, example in enumerate(examples):
            size = int(answers.lengths[example])
            first = int(starts[example])
            self.tokens[place : place + size] = answers.tokens[first : first + size]
            self.begins[place : place + size] = answers.begins[first : first + size]
            self._position[place : place + size] = np.arange(size)
            self._doc[place : place + size] = number
            self.starts.append(place)
            self.stops.append(place + size)
            self.prompts.append(int(answers.prompts[example]))
            place += size

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        return {
            "clean": self.tokens,
            "clean_position": self._position,
            "clean_doc": self._doc,
        }


class _Noisy:
    """The noisy half of a row, filled copy by copy."""

    def __init__(self, length: int) -> None:
        self.filled = 0
        self._arrays: dict[str, NDArray[np.generic]] = {
            "noisy": np.zeros(length, np.int64),
            "noisy_position": np.zeros(length, np.int64),
            "doc_start": np.zeros(length, np.int32),
            "window_start": np.zeros(length, np.int32),
            "window": np.full(length, -1, np.int32),
            "block": np.zeros(length, np.int32),
            "target": np.full(length, -1, np.int32),
            "weight": np.zeros(length, np.float32),
        }

    def add(self, **parts: NDArray[np.generic]) -> None:
        length = len(self._arrays["noisy"])
        count = min(len(parts["noisy"]), length - self.filled)
        for name, values in parts.items():
            self._arrays[name][self.filled : self.filled + count] = values[:count]
        if count and count < len(parts["noisy"]):
            # The position that the last row predicts was cut off with the rest.
            self._arrays["target"][self.filled + count - 1] = -1
            self._arrays["weight"][self.filled + count - 1] = 0.0
        self.filled += count

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        return self._arrays
