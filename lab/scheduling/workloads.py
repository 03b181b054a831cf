"""Workloads: requests whose answers are known, and proposals as a trained model accepts them.

Nothing of a model is run. `Drafted` answers are verified, and each draft after the first is right
by a chance of its request; `Filled` ones become sure with a chance that falls with the distance
from what is filled. Both chances are fitted to tokens per step that were measured.
"""

import math
import random
from dataclasses import dataclass
from typing import Final, Protocol

from d2f_runtime.decoding.decoder import BlockDecoder
from d2f_runtime.decoding.draft_decoder import DraftDecoder
from d2f_runtime.decoding.window import NO_TOKEN, Proposals, Window
from d2f_stream.core.params import GenerationParams

__all__ = ["EOS", "MASK", "PLAIN", "PROMPT_TOKENS", "Drafted", "Filled", "Request", "Workload"]

EOS: Final = 1
MASK: Final = 0
PLAIN: Final = 2
PROMPT_TOKENS: Final = 256
MAX_NEW_TOKENS: Final = 256
WRONG: Final = 9
CPU_ROWS: Final = 16
"""Spare rows up to which a device has no branches."""


class Request(Protocol):
    """One answer to come."""

    @property
    def decoder(self) -> BlockDecoder | DraftDecoder:
        """Of the answer."""
        ...

    def propose(self, window: Window) -> Proposals:
        """Return what the model would."""
        ...


class Workload(Protocol):
    """Requests of one kind."""

    @property
    def params(self) -> GenerationParams:
        """Of all requests."""
        ...

    @property
    def shift_logits(self) -> bool:
        """Whether a last mask needs no row."""
        ...

    def request(self, chance: random.Random) -> Request:
        """Return one more."""
        ...


@dataclass(frozen=True)
class Drafted:
    """Verified answers.

    Attributes:
        params: of all requests.
        skill: mean chance that a draft is right, if those before it are.
        spare_rows: see `ModelInfo`; branches come with many.
        spread: how far a request's own chance may lie from that.
    """

    params: GenerationParams
    skill: float
    spare_rows: int
    spread: float = 0.1
    shift_logits: bool = True

    def request(self, chance: random.Random) -> Request:
        """Return one with a skill and a length of its own."""
        skill = min(0.98, max(0.02, chance.uniform(-1, 1) * self.spread + self.skill))
        decoder = DraftDecoder(
            prompt_tokens=[PLAIN] * PROMPT_TOKENS,
            params=self.params,
            mask_id=MASK,
            eos_ids=(EOS,),
            spare_rows=self.spare_rows,
            branches=self.spare_rows > CPU_ROWS,
        )
        return _DraftedRequest(decoder, skill, _end_of(chance), random.Random(chance.random()))


@dataclass
class _DraftedRequest:
    decoder: DraftDecoder
    skill: float
    end: int
    chance: random.Random

    def propose(self, window: Window) -> Proposals:
        tokens, confidence = [NO_TOKEN] * window.num_entries, [0.0] * window.num_entries
        places = [*range(window.start, window.stop)]
        places += [position + 1 for position in window.branch_positions()]
        for at in window.asked(MASK):
            is_said = at <= window.num_to_cache and at < len(window.tokens)
            is_right = is_said or self.chance.random() < self.skill
            tokens[at] = _truth(places[at], self.end) if is_right else WRONG
            confidence[at] = 1.0 if is_said else self.skill
        return Proposals(tokens, confidence)


@dataclass(frozen=True)
class Filled:
    """Answers whose blocks fill at once here and there, and are final when they are full.

    Attributes:
        params: of all requests.
        sure: chance that the first mask is accepted in a step.
        reach: masks after which that chance is a third of it.
    """

    params: GenerationParams
    sure: float
    reach: float
    shift_logits: bool = False

    def request(self, chance: random.Random) -> Request:
        """Return one with a length and a difficulty of its own."""
        decoder = BlockDecoder(
            prompt_tokens=[PLAIN] * PROMPT_TOKENS, params=self.params, mask_id=MASK, eos_ids=(EOS,)
        )
        reach = self.reach * chance.uniform(0.7, 1.3)
        return _FilledRequest(
            decoder, self.sure, reach, _end_of(chance), random.Random(chance.random())
        )


@dataclass
class _FilledRequest:
    decoder: BlockDecoder
    sure: float
    reach: float
    end: int
    chance: random.Random

    def propose(self, window: Window) -> Proposals:
        tokens = [NO_TOKEN] * len(window.tokens)
        confidence = [0.0] * len(window.tokens)
        asked = window.asked(MASK)
        for number, at in enumerate(asked):
            tokens[at] = _truth(window.start + at, self.end)
            is_sure = self.chance.random() < self.sure * math.exp(-number / self.reach)
            confidence[at] = 0.99 if is_sure else 0.5 - number * 1e-4
        return Proposals(tokens, confidence)


def _end_of(chance: random.Random) -> int:
    return PROMPT_TOKENS + chance.randint(MAX_NEW_TOKENS // 2, MAX_NEW_TOKENS)


def _truth(position: int, end: int) -> int:
    return EOS if position >= end else 3 + position % 5
