"""Calls: how an engine over replicas reaches them."""

from collections.abc import AsyncIterator
from typing import Protocol

__all__ = ["Calls", "ReplicaLost"]


class ReplicaLost(Exception):
    """The replica that a call went to is gone, or could not be reached."""


class Calls(Protocol):
    """Calls replicas: each call goes to whichever has most room, and waits where none has."""

    async def call(self, method: str, data: bytes) -> bytes:
        """Call a method of a `ReplicaWorker`. Safe to cancel.

        Raises:
            ReplicaLost: the replica died meanwhile.
            D2FError: there are none, or the call failed.
        """
        ...

    def stream(self, method: str, data: bytes) -> AsyncIterator[bytes]:
        """Call one that yields. Closing it early ends it there too; raises as `call`."""
        ...

    async def close(self) -> None:
        """Call nobody any more."""
        ...
