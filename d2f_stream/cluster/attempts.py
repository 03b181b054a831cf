"""Attempts: how often a request is given to another replica, and how long after the last one."""

import asyncio
import logging
from typing import Final

__all__ = ["Attempts"]

logger = logging.getLogger("d2f_stream.cluster")

BACKOFF_S: Final = (0.05, 0.2, 0.5, 1.0, 2.0)
"""Between two attempts; the last is for all later ones."""
MAX_FAILURES: Final = 5
"""Engines that may fail with one request, until it is held to be its own fault."""


class Attempts:
    """The attempts at one request. There is no end to those whose replica died: it is replaced.

    Args:
        what: is attempted, for the log.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._num_attempts = 0
        self._num_failures = 0

    async def lost(self, error: Exception) -> None:
        """Wait after a replica was lost. Safe to cancel."""
        logger.warning("%s goes to another replica: %s", self._what, str(error).partition("\n")[0])
        pause_s = BACKOFF_S[min(self._num_attempts, len(BACKOFF_S) - 1)]
        self._num_attempts += 1
        await asyncio.sleep(pause_s)

    async def failed(self, error: Exception) -> None:
        """Wait after an engine has failed with the request; raise the error of one too many."""
        self._num_failures += 1
        if self._num_failures == MAX_FAILURES:
            raise error
        await self.lost(error)
