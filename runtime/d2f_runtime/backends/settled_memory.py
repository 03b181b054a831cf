"""Memory of an opened session: what it does not need goes back, the rest lies in huge pages.

Opening a session unpacks weights by way of arrays of 32 bits, gigabytes that C's allocator would
keep. And a step reads all weights: finding their 4 KiB pages, 36,000 for 145 MB, took an eighth of
its time; 72 pages of 2 MiB fit into a processor's tables. Libraries allocate as they like, so what
they have filled is collapsed afterwards (madvise, MADV_COLLAPSE, Linux 6.1).

Elsewhere, and where the system refuses, nothing changes but time and memory: nothing here fails.

Shapes: P pages, H huge pages.
"""

import ctypes
import mmap
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["give_back", "settled_memory"]

MAPPINGS: Final = Path("/proc/self/maps")
PAGES: Final = Path("/proc/self/pagemap")
ANONYMOUS: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0\s*(\[heap\])?$")
HUGE: Final = 2 << 20  # bytes
ENTRY: Final = 8  # bytes of a page in PAGES, the last bit of which says whether it is in memory
FILLED: Final = 0.5  # of a huge page, for which it is worth the memory
MADV_COLLAPSE: Final = 25

Span = tuple[int, int]  # addresses, half open


@contextmanager
def settled_memory() -> Iterator[None]:
    """Give back what the block has freed; move what it has filled and keeps to huge pages."""
    if sys.platform != "linux":
        yield
        return
    before = _anonymous()
    yield
    give_back()
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for span in _anonymous():
        for part in _without(span, before):
            for start, stop in _filled(*part):
                libc.madvise(start, stop - start, MADV_COLLAPSE)  # it may refuse


def give_back() -> None:
    """Give the system what C's allocator keeps of freed memory."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # of glibc
        libc.malloc_trim(0)


def _anonymous() -> list[Span]:
    """Return where this process's private memory lies, in order; nothing if it is not told."""
    try:
        lines = MAPPINGS.read_text().splitlines()
    except OSError:
        return []
    matches = (ANONYMOUS.match(line) for line in lines)
    return [(int(match[1], 16), int(match[2], 16)) for match in matches if match]


def _without(span: Span, others: Sequence[Span]) -> Iterator[Span]:
    """Yield the parts of a span that none of the others, which are in order, holds."""
    start, stop = span
    for first, last in others:
        if start < first < stop:
            yield start, first
        if first < stop:
            start = max(start, last)
    if start < stop:
        yield start, stop


def _filled(start: int, stop: int) -> Iterator[Span]:
    """Yield the runs of aligned huge pages of which enough is in memory."""
    start, stop = -(-start // HUGE) * HUGE, stop // HUGE * HUGE
    if start >= stop:
        return
    try:
        with PAGES.open("rb", buffering=0) as file:
            file.seek(start // mmap.PAGESIZE * ENTRY)
            data = file.read((stop - start) // mmap.PAGESIZE * ENTRY)
    except OSError:
        return
    pages: npt.NDArray[Any] = np.frombuffer(data, np.int64).reshape(-1, HUGE // mmap.PAGESIZE)
    filled = (pages < 0).mean(axis=1) >= FILLED  # [H]
    edges = np.flatnonzero(np.diff(filled, prepend=False, append=False))
    for first, last in edges.reshape(-1, 2).tolist():
        yield start + first * HUGE, start + last * HUGE
