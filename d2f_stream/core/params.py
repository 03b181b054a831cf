"""Generation parameters: one frozen, validated value for a request.

Knows the names, ranges and meaning of the settings of D2F decoding (arXiv 2508.09192, section 4 and
table 8) and nothing of models or backends. A model's own defaults come with its manifest.
"""

from collections.abc import Sequence
from typing import Literal, TypedDict

import msgspec

from d2f_stream.core.errors import InvalidParams
from d2f_stream.core.nearest import one_of
from d2f_stream.core.printable import is_encodable

__all__ = [
    "MAX_BLOCK_SIZE",
    "Attention",
    "Commit",
    "GenerationParams",
    "ParamOverrides",
    "Rank",
    "Schedule",
    "Stop",
    "StopAtEos",
    "Tail",
    "check_given",
]

MAX_BLOCK_SIZE = 1024
MAX_STOP_STRINGS = 16
MAX_INTEGER = 2**63 - 1  # what travels to a server as an integer

Attention = Literal["blocks", "full"]
Commit = Literal["filled", "verify"]
Rank = Literal["confidence", "margin", "neg_entropy", "position"]
Schedule = Literal["even", "masks", "linear"]
Stop = str | Sequence[str]
StopAtEos = Literal["truncate", "drain"]
Tail = Literal["cut", "drop", "whole"]


class ParamOverrides(TypedDict, total=False):
    """The keyword arguments of generate(): any field of GenerationParams."""

    max_new_tokens: int
    block_size: int
    add_threshold: float
    activate_threshold: float
    confidence_threshold: float
    max_active_blocks: int | None
    temperature: float
    top_p: float
    seed: int | None
    rank: Rank
    stop: Stop
    stop_at_eos: StopAtEos
    tail: Tail
    num_per_step: int
    steps_per_block: int
    schedule: Schedule
    edit_threshold: float | None
    max_edit_steps: int
    sub_block_size: int
    attention: Attention
    may_narrow: bool
    commit: Commit
    drafts: bool
    logprobs: bool


class GenerationParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one answer is decoded. Validated on construction; `with_overrides` gives a changed copy.

    Attributes:
        max_new_tokens: upper bound of the answer, tokens.
        block_size: positions denoised together, tokens.
        add_threshold: a new masked block joins once this share of the last block is filled,
            in (0, 1].
        activate_threshold: the successor of a block filled to this share must accept at least its
            best proposal in each step, in (0, 1].
        confidence_threshold: a proposal above this (strictly) is accepted, in (0, 1].
        max_active_blocks: how many unfilled blocks may be denoised at once; None is unbounded, 1
            switches the pipeline off.
        temperature: 0 is greedy.
        top_p: nucleus mass, in (0, 1].
        seed: of the sampling noise, any signed 64-bit integer; None draws a fresh one. No effect at
            temperature 0.
        rank: what picks the forced proposals of a fully activated block, the highest first;
            "position" is the leftmost first.
        stop: a string, or several, that end the answer and are not part of it; "" is none. Kept as
            a tuple, whatever it was given as.
        stop_at_eos: "truncate" stops once everything up to the first EOS is final; "drain" denoises
            the blocks after it too, as the reference loop does.
        tail: when block_size does not divide max_new_tokens, "cut" shortens the last block and
            "drop" leaves it out, as the reference loop does. "whole" denoises all of it and keeps
            what max_new_tokens allows, as SDAR and LLaDA2 are published.
        num_per_step: how many proposals a block accepts in each step, the best by `rank`, whatever
            their confidence; 0 goes by `confidence_threshold`.
        steps_per_block: in how many steps a fully activated block is filled at the latest: where
            fewer than a step's share of it are above `confidence_threshold`, the share is accepted,
            the best by `rank`. With a threshold of 1, which nothing passes, each step accepts its
            share. 0 forces one proposal a step. No effect with `num_per_step`.
        schedule: of `steps_per_block`: "even" shares the block's size out, the remainder first;
            "masks" only what the prompt left of it; "linear" takes of the masks that are left what
            falls to each of the steps left, rounded half to even.
        edit_threshold: while a block is open, a token that is set already is replaced by another
            proposal above this (strictly), in [0, 1]; None edits nothing. The block is final once
            it has no masks and a step changes nothing (LLaDA2.1). One block at a time.
        max_edit_steps: how many steps a block without masks may be edited.
        sub_block_size: a block is filled part by part, each of this size, from left to right; 0
            makes it one part. With parts, a model that predicts from the position before takes a
            block's first token by itself and at once, whatever its confidence (Fast-dLLM v2).
        attention: "blocks" is full inside a block and causal across. "full" makes prompt and
            answer one attention block, as masked diffusion models are decoded without D2F: all
            `max_new_tokens` positions are on the canvas from the start and nothing is cached, so
            that each step costs the whole canvas. `stop_at_eos="drain"` then fills all of them.
        may_narrow: whether fewer blocks may be denoised at once while other sessions share the
            engine's steps. Many sessions are then served faster, but the answer, a greedy one too,
            depends on what else runs. Without it windows never change for others' sake: sessions
            that do not fit into a step take turns. Limits.may_narrow is the default of an engine.
        commit: when a block is final. "filled": as soon as no position of it is masked. "verify":
            once the model's own next-token predictions say the same; the first that differs
            replaces what was drafted. The answer, greedy or sampled, is then that of
            `block_size=1`. So many masks as a block has tokens draft at a time, a draft is verified
            where its confidence is above the threshold, and `max_active_blocks` bounds the rows of
            a step to those of so many blocks and one more; all of that decides the speed alone.
            For models converted from autoregressive ones, whose default it is.
        drafts: also emit provisional events while a block is being denoised.
        logprobs: blocks also tell the log-probability and the text of each of their tokens.

    Raises:
        InvalidParams: on construction, for the first field out of range.
    """

    max_new_tokens: int = 256
    block_size: int = 32
    add_threshold: float = 0.1
    activate_threshold: float = 0.95
    confidence_threshold: float = 0.9
    max_active_blocks: int | None = 4
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    rank: Rank = "confidence"
    stop: Stop = ()
    stop_at_eos: StopAtEos = "truncate"
    tail: Tail = "cut"
    num_per_step: int = 0
    steps_per_block: int = 0
    schedule: Schedule = "even"
    edit_threshold: float | None = None
    max_edit_steps: int = 16
    sub_block_size: int = 0
    attention: Attention = "blocks"
    may_narrow: bool = False
    commit: Commit = "filled"
    drafts: bool = False
    logprobs: bool = False

    def __post_init__(self) -> None:
        _check_count("max_new_tokens", self.max_new_tokens, 1, None)
        _check_count("block_size", self.block_size, 1, MAX_BLOCK_SIZE)
        for name in ("add_threshold", "activate_threshold", "confidence_threshold", "top_p"):
            _check_share(name, getattr(self, name))
        if self.max_active_blocks is not None:
            _check_count("max_active_blocks", self.max_active_blocks, 1, None)
        if not _is_number(self.temperature) or not 0.0 <= self.temperature <= 100.0:
            raise InvalidParams("temperature", self.temperature, "between 0 (greedy) and 100")
        if self.seed is not None:
            _check_count("seed", self.seed, -(2**63), 2**63 - 1)
        _check_choice("rank", self.rank, ("confidence", "margin", "neg_entropy", "position"))
        _check_choice("stop_at_eos", self.stop_at_eos, ("truncate", "drain"))
        _check_choice("tail", self.tail, ("cut", "drop", "whole"))
        _check_count("num_per_step", self.num_per_step, 0, MAX_BLOCK_SIZE)
        _check_count("steps_per_block", self.steps_per_block, 0, MAX_BLOCK_SIZE)
        _check_choice("schedule", self.schedule, ("even", "masks", "linear"))
        if self.edit_threshold is not None:
            _check_edit_threshold(self.edit_threshold)
        _check_count("max_edit_steps", self.max_edit_steps, 0, None)
        _check_count("sub_block_size", self.sub_block_size, 0, MAX_BLOCK_SIZE)
        _check_choice("attention", self.attention, ("blocks", "full"))
        if not isinstance(self.may_narrow, bool):
            raise InvalidParams("may_narrow", self.may_narrow, "True or False")
        _check_choice("commit", self.commit, ("filled", "verify"))
        if self.tail == "drop" and self.max_new_tokens < self.block_size:
            allowed = f"at least block_size ({self.block_size}) when tail is 'drop'"
            raise InvalidParams("max_new_tokens", self.max_new_tokens, allowed)
        msgspec.structs.force_setattr(self, "stop", _stop_strings(self.stop))

    def with_overrides(self, overrides: ParamOverrides) -> "GenerationParams":
        """Return a copy with the given fields changed.

        Raises:
            InvalidParams: for an unknown field or a value out of range.
        """
        unknown = sorted(set(overrides) - set(self.__struct_fields__))
        if unknown:
            allowed = one_of(unknown[0], sorted(self.__struct_fields__))
            raise InvalidParams("parameter", unknown[0], allowed)
        return msgspec.structs.replace(self, **overrides)

    @property
    def num_blocks(self) -> int:
        """Answer blocks that max_new_tokens allows on a grid that starts at the prompt's end."""
        whole, rest = divmod(self.max_new_tokens, self.block_size)
        return whole + (1 if rest and self.tail != "drop" else 0)


def check_given(params: object) -> None:
    """Refuse what is given as parameters and is none.

    Raises:
        InvalidParams: it is neither GenerationParams nor None.
    """
    if params is not None and not isinstance(params, GenerationParams):
        raise InvalidParams("params", params, "GenerationParams or None; give fields by name")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_count(name: str, value: object, low: int, high: int | None) -> None:
    allowed = (
        f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    )
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidParams(name, value, allowed)
    if value < low or (high is not None and value > high):
        raise InvalidParams(name, value, allowed)
    if value > MAX_INTEGER:
        raise InvalidParams(name, value, f"an integer from {low} to {MAX_INTEGER}")


def _check_share(name: str, value: float) -> None:
    if not _is_number(value) or not 0.0 < value <= 1.0:  # False for NaN too
        raise InvalidParams(name, value, "above 0 and at most 1")


def _check_edit_threshold(value: float) -> None:
    if not _is_number(value) or not 0.0 <= value <= 1.0:  # False for NaN too
        raise InvalidParams("edit_threshold", value, "None, or from 0 to 1")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidParams(name, value, one_of(str(value), allowed))


def _stop_strings(stop: object) -> tuple[str, ...]:
    given = (stop,) if isinstance(stop, str) and stop else stop or ()
    if not isinstance(given, tuple | list) or not all(isinstance(s, str) and s for s in given):
        raise InvalidParams("stop", stop, "a string, or a list or tuple of non-empty strings")
    if broken := [text for text in given if not is_encodable(text)]:
        raise InvalidParams("stop", broken[0], "whole characters: half a surrogate pair is no text")
    if len(given) > MAX_STOP_STRINGS:
        raise InvalidParams("stop", f"{len(given)} strings", f"at most {MAX_STOP_STRINGS} strings")
    return tuple(given)
