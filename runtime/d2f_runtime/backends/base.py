"""The seam between the engine and whatever runs a model: one step method, no phases.

Prefill and decode are one call: the prompt is block 0, already filled and waiting to be cached.
Backends are blocking and not thread-safe; the engine calls them on one device thread only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType, Protocol

from d2f_runtime.decoding.window import Proposals, Window
from d2f_runtime.models.facts import ModelInfo
from d2f_stream.core.params import GenerationParams, Rank

__all__ = ["Backend", "Slot", "StepRow"]

Slot = NewType("Slot", int)


@dataclass(frozen=True, slots=True)
class StepRow:
    """One session's part of a step; each has a slot of its own.

    `uniforms` holds one number in [0, 1) per window position for the inverse CDF; None when
    `temperature` is 0. `num_prompt` is where the answer begins, for backends that have a script.
    """

    slot: Slot
    window: Window
    temperature: float = 0.0
    top_p: float = 1.0
    rank: Rank = "confidence"
    uniforms: Sequence[float] | None = None
    num_prompt: int | None = None


class Backend(Protocol):
    """Runs steps of one model on one device."""

    @property
    def info(self) -> ModelInfo:
        """Facts about the loaded model."""
        ...

    def check(self, params: GenerationParams) -> None:
        """Refuse settings that this backend cannot serve, before anything is started.

        Raises:
            InvalidParams: for the first such setting.
        """
        ...

    def warm_up(self) -> None:
        """Do now what the first steps would have to do: compile, capture. Blocks; idempotent."""
        ...

    def open_slot(self, capacity: int) -> Slot:
        """Reserve K/V storage for `capacity` tokens.

        Raises:
            OutOfCapacity: no room for it now.
        """
        ...

    def step(self, rows: Sequence[StepRow]) -> list[Proposals]:
        """Run one forward for all rows, in order; cache the first `num_to_cache` of each."""
        ...

    def copy_prefix(self, source: Slot, target: Slot, num_tokens: int) -> None:
        """Store in `target`, which holds nothing yet, what `source` holds for its first tokens."""
        ...

    def close_slot(self, slot: Slot) -> None:
        """Free the slot's storage. Idempotent."""
        ...

    def close(self) -> None:
        """Free the model. Idempotent."""
        ...
