"""Documents: the prose of all files, each paragraph once, in a training and a held-out part.

A document is what stays of one docstring, comment or file. Whole files are held out, by a hash of
their path, since the docstrings of one file resemble each other.
"""

import hashlib
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from d2f_export.open_text.prose import paragraph_key, paragraphs
from d2f_export.open_text.sources import find_files, texts

__all__ = ["Document", "Gathered", "gather"]

HELD_OUT_SHARE: Final = 14  # one file in so many
MIN_CHARACTERS: Final = 200
CHUNK: Final = 32  # files of one task of a worker

Paragraph = tuple[int, str]  # a hash of its key, and the text
Document = tuple[str, ...]  # of paragraphs


class _File(NamedTuple):
    is_held_out: bool
    documents: list[list[Paragraph]]


@dataclass(frozen=True, slots=True)
class Gathered:
    """The documents of both parts, and how many files and prose characters they came from."""

    train: list[Document]
    held_out: list[Document]
    num_files: int
    num_characters: int

    @property
    def num_kept(self) -> int:
        """Characters of all documents."""
        return sum(len(p) for part in (self.train, self.held_out) for d in part for p in d)


def gather(roots: Sequence[Path], *, num_workers: int = 0) -> Gathered:
    """Read all documentation under the roots.

    Args:
        roots: folders; a file that several hold is read once.
        num_workers: processes; 0 reads in this one.
    """
    files = find_files(roots)
    chunks = [files[i : i + CHUNK] for i in range(0, len(files), CHUNK)]
    train: list[Document] = []
    held_out: list[Document] = []
    seen: set[int] = set()
    num_characters = 0
    for file in _read_all(chunks, num_workers):
        for document in file.documents:
            num_characters += sum(len(text) for _, text in document)
            fresh = tuple(text for key, text in document if key not in seen)
            seen.update(key for key, _ in document)
            if sum(map(len, fresh)) >= MIN_CHARACTERS:
                (held_out if file.is_held_out else train).append(fresh)
    return Gathered(train, held_out, len(files), num_characters)


def _read_all(chunks: list[list[tuple[Path, str]]], num_workers: int) -> Iterator[_File]:
    if num_workers == 0:
        for chunk in chunks:
            yield from _read(chunk)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        for part in pool.map(_read, chunks):
            yield from part


def _read(files: list[tuple[Path, str]]) -> list[_File]:
    return [
        _File(
            _hash(name) % HELD_OUT_SHARE == 0,
            [
                [(_hash(paragraph_key(p)), p) for p in paragraphs(text)]
                for text in texts(path)
                if len(text) >= MIN_CHARACTERS
            ],
        )
        for path, name in files
    ]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
