"""FairTurns: so many at once, and who waits takes turns by client instead of by arrival.

A client with many requests waits behind itself: each client's first waiting one comes before any
client's second.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

__all__ = ["FairTurns"]


class FairTurns:
    """Lets holders in. Belongs to one event loop.

    Args:
        most: holders at once.
        most_per_client: of those, with one client.
    """

    def __init__(self, *, most: int, most_per_client: int) -> None:
        self._most = most
        self._most_per_client = most_per_client
        self._holders: dict[str, int] = {}  # by client
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # the next client first
        self._paused = False

    @property
    def num_waiting(self) -> int:
        """Those who wait for their turn."""
        return sum(map(len, self._waiting.values()))

    @contextlib.asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Hold a place while the context is open. Safe to cancel."""
        await self.take(client)
        try:
            yield
        finally:
            self.give_back(client)

    async def take(self, client: str) -> None:
        """Wait for a place, to be given back. Safe to cancel."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(place)
        self._let_in()
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.give_back(client)
            else:
                self._forget(client, place)
            raise

    def give_back(self, client: str) -> None:
        """End a turn: the next client's begins."""
        left = self._holders.pop(client) - 1
        if left:
            self._holders[client] = left
        self._let_in()

    def pause(self) -> None:
        """Let nobody in until `go_on`. Idempotent."""
        self._paused = True

    def go_on(self) -> None:
        """Let in whoever waits. Idempotent."""
        self._paused = False
        self._let_in()

    def _let_in(self) -> None:
        while not self._paused and sum(self._holders.values()) < self._most:
            client = next((c for c in self._waiting if self._has_room(c)), None)
            if client is None:
                return
            queue = self._waiting.pop(client)
            place = queue.popleft()
            if queue:
                self._waiting[client] = queue  # behind all others
            if not place.done():  # or it was cancelled just now
                self._holders[client] = self._holders.get(client, 0) + 1
                place.set_result(None)

    def _has_room(self, client: str) -> bool:
        return self._holders.get(client, 0) < self._most_per_client

    def _forget(self, client: str, place: "asyncio.Future[None]") -> None:
        queue = self._waiting.get(client)
        if queue is not None and place in queue:
            queue.remove(place)
            if not queue:
                del self._waiting[client]
