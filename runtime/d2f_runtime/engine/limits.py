"""What an engine takes on at once, and how much of that is in use."""

from dataclasses import dataclass

__all__ = ["EngineLoad", "Limits"]


@dataclass(frozen=True, slots=True)
class Limits:
    """How much an engine takes on at once; the backend's own storage may bound it further.

    Attributes:
        max_sessions: sessions that hold a slot.
        max_tokens: tokens that all slots together have room for.
        max_rows: sessions that share a step.
        max_step_tokens: window tokens that a step aims for.
        max_prompt_tokens: of one request; None leaves it to the model.
    """

    max_sessions: int = 32
    max_tokens: int = 2**31
    max_rows: int = 16
    max_step_tokens: int = 1024
    max_prompt_tokens: int | None = None


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
