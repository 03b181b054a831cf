"""EngineLoad: how much of its Limits an engine uses at one moment."""

from dataclasses import dataclass

from d2f_stream.core.limits import Limits

__all__ = ["EngineLoad", "Limits"]


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine does at one moment.

    Attributes:
        num_running: sessions that hold a slot.
        num_waiting: sessions in the queue.
        kv_tokens: tokens that the open slots have room for.
    """

    num_running: int
    num_waiting: int
    kv_tokens: int
