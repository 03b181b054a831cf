"""Pieces: the documents' tokens, one document after the other, cut into rows of equal length.

A document ends with EOS and the next one follows, as in the training of language models; there is
no padding, whose tokens would outnumber all others. A piece begins with a sentence and stops
wherever it is full; the next one begins with the sentence that was cut. Its prompt is its first
sentences, 32 to 64 tokens.

Shapes: N pieces, T = NUM_TOKENS.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Final, Self

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from d2f_export.corpus import EOS_ID
from d2f_export.open_text.documents import Document
from d2f_export.open_text.prose import sentences

__all__ = ["NUM_TOKENS", "Pieces", "cut", "without_copies"]

NUM_TOKENS: Final = 256
MIN_PROMPT, MAX_PROMPT = 32, 64
COPIED: Final = 16  # tokens in a row that make a passage a copy
MAX_COPIED: Final = 0.1  # share of a held-out piece's passages


@dataclass(frozen=True, slots=True)
class Pieces:
    """Rows of tokens.

    Attributes:
        tokens: [N, T].
        prompt_lens: [N].
    """

    tokens: npt.NDArray[np.int16]
    prompt_lens: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.tokens)

    def where(self, chosen: npt.NDArray[np.bool_]) -> "Pieces":
        """Return the chosen rows."""
        return Pieces(self.tokens[chosen], self.prompt_lens[chosen])

    def save(self, path: Path) -> None:
        """Write an .npz file."""
        with path.open("wb") as file:
            np.savez(file, tokens=self.tokens, prompt_lens=self.prompt_lens)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            return cls(arrays["tokens"], arrays["prompt_lens"])


def cut(documents: Sequence[Document], tokenizer: Tokenizer) -> Pieces:
    """Tokenise the documents and cut them into pieces; what fills no whole piece is left out.

    Raises:
        ValueError: there is not enough text for one piece.
    """
    parts = _tokenised(documents, tokenizer)
    lengths = np.array([len(part) for part in parts], np.int64)
    ends = np.cumsum(lengths)
    stream = np.fromiter(chain.from_iterable(parts), np.int16, count=int(lengths.sum()))
    rows: list[npt.NDArray[np.int16]] = []
    prompt_lens: list[int] = []
    first = 0
    while first < len(parts) and (start := int(ends[first] - lengths[first])) <= (
        len(stream) - NUM_TOKENS
    ):
        rows.append(stream[start : start + NUM_TOKENS])
        prompt_lens.append(_prompt_len(lengths[first : first + MAX_PROMPT]))
        num_whole = int(np.searchsorted(ends, start + NUM_TOKENS, side="right")) - first
        first += max(1, num_whole)
    if not rows:
        raise ValueError(f"{len(stream)} tokens fill no piece of {NUM_TOKENS}; read more folders")
    return Pieces(np.stack(rows), np.array(prompt_lens, np.int64))


def without_copies(pieces: Pieces, train: Pieces) -> Pieces:
    """Leave out held-out pieces that share more than a tenth of their passages with training."""
    known = np.unique(_passages(train.tokens))
    copied = np.isin(_passages(pieces.tokens), known)
    return pieces.where(copied.mean(axis=1) <= MAX_COPIED)


def _tokenised(documents: Sequence[Document], tokenizer: Tokenizer) -> list[list[int]]:
    """Return the ids of every sentence; EOS ends a document's last one."""
    split = [_sentences(document) for document in documents]
    encoded = tokenizer.encode_batch_fast(list(chain.from_iterable(split)))
    parts = [encoding.ids for encoding in encoded]
    for last in accumulate(map(len, split)):
        parts[last - 1].append(EOS_ID)
    return parts


def _sentences(document: Document) -> list[str]:
    """Return sentences with what separates them from the ones before."""
    parts: list[str] = []
    for paragraph in document:
        first, *rest = sentences(paragraph)
        parts += [f"\n\n{first}" if parts else first, *(f" {sentence}" for sentence in rest)]
    return parts


def _prompt_len(lengths: npt.NDArray[np.int64]) -> int:
    """Return where the sentence ends that reaches MIN_PROMPT; the middle where it ends too far."""
    ends = np.cumsum(lengths)
    end = int(ends[np.searchsorted(ends, MIN_PROMPT)]) if ends[-1] >= MIN_PROMPT else NUM_TOKENS
    return end if end <= MAX_PROMPT else (MIN_PROMPT + MAX_PROMPT) // 2


def _passages(tokens: npt.NDArray[np.int16]) -> npt.NDArray[np.uint64]:
    """Return [N, T - COPIED + 1] hashes of the passages of COPIED tokens."""
    ids = tokens.astype(np.uint64)
    width = tokens.shape[1] - COPIED + 1
    total = np.zeros((len(tokens), width), np.uint64)
    for offset in range(COPIED):
        total = total * np.uint64(0x9E3779B97F4A7C15) + ids[:, offset : offset + width]
    return total
