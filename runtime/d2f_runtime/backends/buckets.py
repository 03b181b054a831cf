"""The static shapes of the fast step: a step is padded to the smallest one that holds it.

A graph is captured for each. Only rows and sessions are static; positions, places and lengths are
read from device memory. A window holds `max_active_blocks` unfilled blocks and those that
wait to be cached, of 4 to 64 tokens, so any width occurs. Up to 128 rows a step costs
what reading the weights costs, so that finer steps gain nothing; beyond, rows begin to count.

Beyond 512 rows the device is busy for longer than a launch takes, but the launches of all layers
take the host 10 ms and more, and whoever else runs Python beside them makes it twice that. Products
work on 128 or 192 rows at a time there, so that padding up to that costs little.
"""

import functools
from dataclasses import dataclass
from typing import Final

__all__ = [
    "BUCKETS",
    "CROWD",
    "CROWD_TOKENS",
    "MAX_ROWS",
    "Bucket",
    "bucket_for",
    "sessions_beside",
]

ROWS: Final = (1, 16, 32, 64, 128, 160, 192, 224, 256, 320, 384, 448, 512)
SESSIONS: Final = (1, 4, 16, 64)
WIDE_SESSIONS: Final = SESSIONS[2:]
WIDE_ROWS: Final = (576, 640, 768, 896, 1024, 1152, 1536, 2048)
CROWD: Final = 256
"""Runs of rows where windows have branches, each of which is one: as many rows at least."""
CROWDED_ROWS: Final = (128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
MAX_ROWS: Final = WIDE_ROWS[-1]
"""A longer step, such as that of a prompt which cannot be cut, does enough work to hide its
launches."""
CROWD_TOKENS: Final = 1024 * SESSIONS[-1]
"""Of K/V, for as many sessions as share a step at most."""


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A shape: how many rows a step may have at most, and sessions, a branch counting as one."""

    sessions: int
    rows: int

    @property
    def is_wide(self) -> bool:
        """Whether the head is better asked for the masks alone than for all rows."""
        return self.rows > ROWS[-1]

    def num_tiles(self, per_tile: int) -> int:
        """Return how many tiles of `per_tile` rows hold any step of this shape.

        A tile holds rows of one session only, so each session may leave its last one unfilled.
        """
        if self.rows <= self.sessions:
            return self.rows
        return (self.rows - self.sessions) // per_tile + self.sessions


BUCKETS: Final = (
    *(Bucket(sessions, rows) for sessions in SESSIONS for rows in ROWS),
    *(Bucket(sessions, rows) for sessions in WIDE_SESSIONS for rows in WIDE_ROWS),
    *(Bucket(CROWD, rows) for rows in CROWDED_ROWS),
)


def sessions_beside(num_tokens: int) -> int:
    """Return how many sessions share a step, whose K/V take so many tokens together."""
    return SESSIONS[-1] if 2 * num_tokens >= CROWD_TOKENS else SESSIONS[-2]


@functools.lru_cache(maxsize=4096)
def bucket_for(num_rows: int, num_sessions: int) -> Bucket | None:
    """Return the smallest bucket for so many rows of so many sessions; None where none is."""
    holding = (b for b in BUCKETS if num_sessions <= b.sessions and num_rows <= b.rows)
    return min(holding, default=None)
