"""Systems: who continues the texts, and how. The comparison's list, most wanted first.

The student over confidence thresholds and block sizes, greedy and at temperatures, since greedy
continuations repeat themselves whoever writes them; the autoregressive twin; the teacher's vanilla
decoding; and the student one token at a time, which is its text without parallel acceptance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from d2f_export.embedded import Stage
from d2f_stream.params import GenerationParams

__all__ = ["REFERENCES", "System", "systems"]

Name = Literal["human", "training", "ar", "vanilla", "one-token", "d2f", "no-pipeline"]

TEMPERATURES: Final = (1.0, 0.7)


@dataclass(frozen=True, slots=True)
class System:
    """One way to continue a text.

    Attributes:
        name: "human" is the text's own continuation, "training" that of texts that were trained on.
        stage: whose weights write; None where nothing is decoded.
        params: how.
    """

    name: Name
    stage: Stage | None = None
    params: GenerationParams = GenerationParams()  # noqa: RUF009  (frozen)

    @property
    def setting(self) -> dict[str, Any]:
        """What tells it from the others of its name."""
        if self.stage is None:
            return {}
        fields = ("block_size", "confidence_threshold", "max_active_blocks", "temperature")
        return {name: getattr(self.params, name) for name in fields}


REFERENCES: Final = (System("human"), System("training"))


def systems(num_new: int, thresholds: Sequence[float]) -> list[System]:
    """Return all systems.

    Args:
        num_new: tokens of a continuation.
        thresholds: of confidence, for the greedy student; every other one for the rest.
    """

    def params(**values: Any) -> GenerationParams:
        return GenerationParams(max_new_tokens=num_new, **values)

    ar: list[System] = [
        System("ar", "twin", params(block_size=1, max_active_blocks=1, temperature=temperature))
        for temperature in (0.0, *TEMPERATURES)
    ]
    slow = {"block_size": 16, "max_active_blocks": 1, "num_per_step": 1}
    single = [
        System("vanilla", "teacher", params(**slow, attention="full")),
        System("one-token", "student", params(**slow)),
        System("one-token", "student", params(**slow, temperature=1.0)),
    ]
    greedy = [
        System("d2f", "student", params(block_size=size, confidence_threshold=threshold))
        for size in (16, 32)
        for threshold in thresholds
    ]
    sampled = [
        System(
            "d2f",
            "student",
            params(block_size=16, confidence_threshold=threshold, temperature=temperature),
        )
        for temperature in TEMPERATURES
        for threshold in thresholds[::2]
    ]
    no_pipeline = [
        System(
            "no-pipeline",
            "student",
            params(block_size=16, max_active_blocks=1, confidence_threshold=threshold),
        )
        for threshold in thresholds[::2]
    ]
    return [*ar, *single, *greedy, *sampled, *no_pipeline]
