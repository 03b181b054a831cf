"""RequestKind: how fast the answers of a request fill, and how wide its windows may be."""

from dataclasses import dataclass
from functools import cached_property
from typing import Final

from d2f_runtime.decoding.width import Width, widths_of
from d2f_runtime.engine.width_gains import WidthGains
from d2f_runtime.models.facts import ModelInfo
from d2f_stream.core.params import GenerationParams, ParamOverrides

__all__ = ["RequestKind", "least_part"]

SHARE: Final = 4
LEAST: Final = 8
"""Tokens of a part of a block that a model knows as a whole; it is a quarter of it at least."""

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


def least_part(info: ModelInfo, block_size: int) -> int | None:
    """Return how many tokens of a model's blocks may join by themselves; None where none may.

    On a grid blocks are what the model was made for. One that caches its answers as an
    autoregressive model does is such a model at one token a step. Others take smaller blocks than
    they were trained with, within limits: of 60 problems the embedded one has 59 right in blocks of
    16 and of 8, 55 in blocks of 4 and 53 of 2.
    """
    if info.prompt_attention in ("grid", "prompt_grid"):
        return None
    says_next = info.shift_logits and info.prompt_attention == info.commit_attention == "causal"
    return 1 if says_next else max(LEAST, block_size // SHARE)


@dataclass(frozen=True)
class RequestKind:
    """Requests that fill alike, as far as their parameters say.

    Attributes:
        params: with what plays no part in that left at its default.
        block_size: of the answer, tokens.
        least_part: tokens of a block that may join by themselves; None leaves blocks whole.
    """

    params: GenerationParams
    block_size: int
    least_part: int | None = None

    def __hash__(self) -> int:
        """Return the same as ever, worked out once: each step asks for it several times."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.params, self.block_size, self.least_part))

    @classmethod
    def of(
        cls, params: GenerationParams, block_size: int, *, least_part: int | None = None
    ) -> "RequestKind":
        """Return the kind of a request whose answer is cut into blocks of `block_size`."""
        kept = params.with_overrides(IRRELEVANT)
        return cls(kept, block_size, least_part)

    @cached_property
    def widths(self) -> tuple[Width, ...]:
        """The widths that its windows may have, narrowest first; the last is OWN."""
        return widths_of(self.params, self.block_size, least_part=self.least_part)

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
