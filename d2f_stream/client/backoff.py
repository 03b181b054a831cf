"""Backoff: how long a client keeps trying, and how long it waits between two tries.

Exponential with full jitter (each wait is drawn evenly from 0 up to a doubling bound), so that the
clients of a server that comes back do not come back in step; after Marc Brooker, "Exponential
Backoff and Jitter", AWS Architecture Blog, 2015. Knows nothing of connections.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from d2f_stream.core.errors import ConnectionLost

__all__ = ["Backoff", "Retries"]


@dataclass(frozen=True, slots=True)
class Backoff:
    """When to try again. Clock, sleep and chance come in, so that tests need no real time.

    Attributes:
        timeout_s: seconds from the loss of a connection after which nothing is tried any more.
        first_s: bound of the second wait; the first try comes at once.
        longest_s: no wait is longer.
        sleep: waits for so many seconds.
        chance: a number in [0, 1).
        clock: seconds of a monotonic clock.
    """

    timeout_s: float = 30.0
    first_s: float = 0.25
    longest_s: float = 5.0
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    chance: Callable[[], float] = random.random
    clock: Callable[[], float] = time.monotonic


class Retries:
    """The tries after one loss."""

    def __init__(self, backoff: Backoff) -> None:
        self._backoff = backoff
        self._num_tries = 0
        self._began_s = 0.0

    def reset(self) -> None:
        """Begin anew: the connection had been of use before it was lost."""
        self._num_tries = 0

    async def wait(self, reason: Exception) -> None:
        """Wait until the next try is due. Safe to cancel.

        Raises:
            ConnectionLost: it would come after `timeout_s`; names the reason of the last loss.
        """
        backoff = self._backoff
        if self._num_tries == 0:
            self._began_s = backoff.clock()
        delay_s = self._delay_s()
        self._num_tries += 1
        if backoff.clock() + delay_s - self._began_s > backoff.timeout_s:
            raise ConnectionLost(
                f"the server could not be reached for {backoff.timeout_s:g} s "
                f"({self._num_tries} tries): {reason}"
            ) from reason
        await backoff.sleep(delay_s)

    def _delay_s(self) -> float:
        if self._num_tries == 0:
            return 0.0
        backoff = self._backoff
        bound_s = backoff.first_s * 2.0 ** min(self._num_tries - 1, 32)
        return backoff.chance() * min(bound_s, backoff.longest_s)
