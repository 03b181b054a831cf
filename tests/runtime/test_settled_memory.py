"""Memory that a session leaves behind: what is kept stays as it was, what is freed goes back."""

import ctypes
import mmap
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from d2f_runtime.backends.settled_memory import HUGE, settled_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it does nothing")

SIZE = 8 * HUGE


def resident() -> int:
    """Return bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def in_huge_pages(address: int) -> int:
    """Return how many bytes of the mapping around an address are."""
    spans = re.findall(
        r"^([0-9a-f]+)-([0-9a-f]+) .*?^AnonHugePages:\s+(\d+) kB",
        Path("/proc/self/smaps").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    found = [int(kb) for start, stop, kb in spans if int(start, 16) <= address < int(stop, 16)]
    return found[0] << 10


def test_what_is_kept_has_its_content_and_huge_pages() -> None:
    with settled_memory():
        kept = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        values = np.frombuffer(kept, np.int64)
        values[:] = np.arange(len(values))
    assert (values == np.arange(len(values))).all()
    release = tuple(int(part) for part in re.findall(r"\d+", Path("/proc/version").read_text())[:2])
    if release < (6, 1) or not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel does not collapse pages")
    assert in_huge_pages(values.ctypes.data + SIZE // 2) >= SIZE // 2


def test_memory_that_is_not_in_use_stays_so() -> None:
    before = resident()
    with settled_memory():
        sparse = mmap.mmap(-1, 64 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for at in range(0, len(sparse), HUGE):
            sparse[at] = 1
    assert resident() - before < 16 * HUGE


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_what_is_freed_below_something_kept_is_given_back() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    size, number = 32 << 10, 4096
    before = resident()
    with settled_memory():
        freed = [libc.malloc(size) for _ in range(number)]
        for address in freed:
            ctypes.memset(address, 1, size)
        kept = libc.malloc(16)
        for address in freed:
            libc.free(address)
    assert resident() - before < size * number // 4
    libc.free(kept)
