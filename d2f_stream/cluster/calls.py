"""Calls: how an engine over replicas reaches them."""

from collections.abc import AsyncIterator
from typing import Protocol

__all__ = ["Calls", "ReplicaLost"]


class ReplicaLost(Exception):
    """The replica that a call went to is gone, or could not be reached."""


class Calls(Protocol):
    """Calls replicas: each call goes to whichever has most room, and waits where none has.

    One with the key of a conversation goes to the replica that had its earlier turns, while that
    is there and has not much more to do than others.
    """

    async def call(self, method: str, data: bytes) -> bytes:
        """Call a method of a `ReplicaWorker`. Safe to cancel.

        Raises:
            ReplicaLost: the replica died meanwhile.
            D2FError: there are none, or the call failed.
        """
        ...

    def stream(self, method: str, data: bytes, *, conversation: str = "") -> AsyncIterator[bytes]:
        """Call one that yields. Closing it early ends it there too; raises as `call`."""
        ...

    async def work(self, data: bytes, *, conversation: str = "", doubts: bool = False) -> bytes:
        """Call `ReplicaWorker.work`; raises as `call`. Safe to cancel, which ends nothing there.

        A replica whose machine vanishes may never break off: the caller sees that from the log.

        Args:
            data: a `WorkOrder`.
            conversation: the key of one.
            doubts: whether a replica may be gone that did not say so: only one that answers now
                gets the call.
        """
        ...

    async def close(self) -> None:
        """Call nobody any more."""
        ...
