"""RequestKind: how fast the answers of a request fill, and how wide its windows may be."""

from dataclasses import dataclass
from functools import cached_property
from typing import Final

from d2f_runtime.decoding.width import Width, widths_of
from d2f_runtime.engine.width_gains import WidthGains
from d2f_stream.core.params import GenerationParams, ParamOverrides

__all__ = ["RequestKind"]

IRRELEVANT: Final[ParamOverrides] = {
    "max_new_tokens": 1,
    "tail": "cut",
    "seed": None,
    "stop": (),
    "stop_at_eos": "truncate",
    "may_narrow": False,
    "drafts": False,
    "logprobs": False,
}
"""Parameters that change nothing in how fast blocks fill."""


@dataclass(frozen=True)
class RequestKind:
    """Requests that fill alike, as far as their parameters say.

    Attributes:
        params: with what plays no part in that left at its default.
        block_size: of the answer, tokens.
    """

    params: GenerationParams
    block_size: int

    @classmethod
    def of(cls, params: GenerationParams, block_size: int) -> "RequestKind":
        """Return the kind of a request whose answer is cut into blocks of `block_size`."""
        kept = params.with_overrides(IRRELEVANT)
        return cls(kept, block_size)

    @cached_property
    def widths(self) -> tuple[Width, ...]:
        """The widths that its windows may have, narrowest first; the last is OWN."""
        return widths_of(self.params, self.block_size)

    @property
    def verifies(self) -> bool:
        """Whether what its answers say does not depend on their windows."""
        return self.params.commit == "verify"

    def gains(self) -> WidthGains:
        """Return what to learn of it, from nothing."""
        blocks = self.params.max_active_blocks
        return WidthGains(
            self.widths,
            block_size=self.block_size,
            verifies=self.verifies,
            max_active_blocks=1 if self.params.attention == "full" else blocks,
        )
