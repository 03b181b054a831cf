"""Limits: how much a local engine takes on at once. Pure values, checked on construction.

Knows nothing of engines. What a server takes from its clients is `server/limits.py`.
"""

import msgspec

from d2f_stream.core.errors import InvalidParams

__all__ = ["Limits"]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much an engine takes on at once; the backend's own storage may bound it further.

    Attributes:
        max_sessions: sessions that hold a slot.
        max_tokens: tokens that all slots together have room for.
        max_rows: sessions that share a step; None are as many as the model's steps are made for.
        max_step_tokens: bound of the window tokens of a step, pieces of prompts included; within
            it, what pays decides.
        max_prompt_tokens: of one request; None leaves it to the model.
        may_narrow: the default of GenerationParams.may_narrow here: whether answers may depend on
            what else runs. Requests that say it themselves, as all presets do, keep their word.

    Raises:
        InvalidParams: on construction, for the first number that is not positive.
    """

    max_sessions: int = 64
    max_tokens: int = 2**31
    max_rows: int | None = None
    max_step_tokens: int = 1024
    max_prompt_tokens: int | None = None
    may_narrow: bool = False

    def __post_init__(self) -> None:
        for name in ("max_sessions", "max_tokens", "max_step_tokens"):
            _check_positive(name, getattr(self, name))
        for name in ("max_rows", "max_prompt_tokens"):
            if (number := getattr(self, name)) is not None:
                _check_positive(name, number)
        if not isinstance(self.may_narrow, bool):
            raise InvalidParams("may_narrow", self.may_narrow, "True or False")


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidParams(name, value, "an integer of at least 1")
