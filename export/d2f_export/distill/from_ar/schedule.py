"""The learning rate and the block sizes over a run.

Warm-up, constant, linear decay at the end of a start of the run (WSD), so that a run can be
prolonged, in other places too, until somebody says that this start is the last.
"""

from collections.abc import Sequence
from typing import Final

from d2f_export.distill.from_ar.feed import Stage
from d2f_export.distill.from_ar.settings import DraftSettings

__all__ = ["curriculum", "rate_at"]

FLOOR: Final = 0.02  # of the rate, at the end of the decay


def rate_at(settings: DraftSettings, step: int, part: float) -> float:
    """Return the learning rate of a step.

    Args:
        settings: of the run.
        step: of the whole run, from 0.
        part: share of this start that is done, 0 to 1.
    """
    rise = min(1.0, (step + 1) / max(1, settings.warmup))
    fall = 1.0
    if settings.decay:
        fall = min(1.0, max(FLOOR, (1.0 - part) / settings.decay))
    return settings.lr * rise * fall


def curriculum(sizes: Sequence[int], steps: int) -> list[tuple[int, Stage]]:
    """Return the stages: the smallest size alone, then one more at a time, none ever left out.

    The size that joined last has as large a share as those before it together; at the end all
    have equal ones.

    Args:
        sizes: rising.
        steps: after which all sizes are there.
    """
    stages = []
    for count in range(1, len(sizes) + 1):
        first = steps * (count - 1) // max(1, len(sizes) - 1)
        weights = [1.0] * count
        if count < len(sizes):
            weights[-1] = float(max(1, count - 1))
        total = sum(weights)
        stages.append((first, Stage(tuple(sizes[:count]), tuple(w / total for w in weights))))
    return stages
