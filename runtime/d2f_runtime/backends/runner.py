"""The seam inside the torch backend: how the rows of a step run on a device."""

from collections.abc import Sequence
from typing import Protocol

from d2f_runtime.backends.base import StepRow
from d2f_runtime.backends.kv_pool import Span
from d2f_runtime.backends.rows import Floats, Masks

__all__ = ["Runner"]


class Runner(Protocol):
    """Runs steps over one model and one pool."""

    def warm_up(self) -> None:
        """Do now what the first steps would have to do. Blocks; idempotent."""
        ...

    def run(self, rows: Sequence[StepRow], spans: Sequence[Span]) -> tuple[Masks, Floats]:
        """Run one forward for all rows; store the K/V and last state of what each caches.

        Args:
            rows: at least one, checked.
            spans: of their slots; unchanged.

        Returns:
            For each row the window positions that hold a mask, N in all; and [4, N] token,
            confidence, margin and neg_entropy there, good until the next run.
        """
        ...
