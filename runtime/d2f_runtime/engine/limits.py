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
        kept_tokens: tokens that slots of ended sessions take, kept for prompts that begin alike.
        reused_tokens: prompt tokens so far that needed no computing, since their K/V were kept.
        prompt_tokens: of running sessions' prompts that are still to be computed.
    """

    num_running: int
    num_waiting: int
    kv_tokens: int
    kept_tokens: int = 0
    reused_tokens: int = 0
    prompt_tokens: int = 0
