"""WidthGains: what windows of each width have really brought, for requests of one kind.

A kind is what decides how fast answers fill: the parameters of decoding. What is learned is the
mean over spans, from one committed block of an answer to the next, of the same width as the span
before: so that no block is credited to a width that only finished it. Older spans count less and
less; a width that was not used for long becomes unknown, and may be tried again. Pure.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from d2f_runtime.decoding.width import MAX_DRAFTS, UNBOUNDED_BLOCKS, Width
from d2f_runtime.engine.fill_laws import BlocksLaw, DraftsLaw, FillLaw

__all__ = ["Gain", "Span", "WidthGains"]

ENOUGH: Final = 4.0
"""Spans after which a width was tried enough."""
KNOWN: Final = 2.0
"""Spans that make a width known; it is again unknown once others have outweighed them."""
SEEN: Final = 0.5
"""Spans below which what was learned of a width is forgotten."""
GUESS: Final = 2.0
"""Spans as many as a guess weighs."""
FORGET: Final = 1 / 512
"""Share of all spans' weight that each further one takes away."""
HOPE: Final = 1.25
"""How much better than it was a width may have become that is unknown again."""
ERROR: Final = 0.35
"""How far a span is thought to be off the mean, before that is seen; so many spans' mean is nearer
by their root."""
LUCK: Final = 0.5
"""Of that error of a mean, how much a width may have had bad luck by and is tried on."""
ERROR_SPANS: Final = 32
"""Spans that tell how far they are off."""
DOUBT: Final = 0.97
"""What of a hope counts, so that nothing is tried for next to nothing."""
TOO_LARGE: Final = 1e9


class Gain(NamedTuple):
    """What a step of one session brings and needs on the mean.

    Attributes:
        tokens: that become final.
        rows: positions that run through the model.
    """

    tokens: float
    rows: float


class Span(NamedTuple):
    """Steps of one width that ended with a committed block.

    Attributes:
        steps: how many.
        tokens: that were committed by them.
        rows: that they ran, a prompt's left out.
    """

    steps: int
    tokens: int
    rows: int


class WidthGains:
    """Learns from spans; answers for each width, narrowest first.

    Args:
        widths: of the kind, narrowest first.
        block_size: of its answers, tokens.
        verifies: whether the answers are verified, so that widths are numbers of drafts.
        max_active_blocks: of the kind's own windows.
    """

    def __init__(
        self,
        widths: Sequence[Width],
        *,
        block_size: int,
        verifies: bool,
        max_active_blocks: int | None,
    ) -> None:
        self._verifies = verifies
        blocks = max_active_blocks or UNBOUNDED_BLOCKS[-1] + 1
        if verifies:
            own = min(blocks * block_size, MAX_DRAFTS)
            masks = [width.max_drafts or own for width in widths]
            self._laws: Sequence[FillLaw] = [DraftsLaw(count) for count in masks]
        else:
            self._laws = [
                BlocksLaw(width.max_active_blocks or blocks, width.part_size or block_size)
                for width in widths
            ]
        self._guesses = [Gain(law.tokens(law.usual), law.rows) for law in self._laws]
        self._unit = 1.0  # what the next span weighs: all before it weigh less in turn
        self._weights = [0.0] * len(widths)
        self._steps = [0.0] * len(widths)
        self._tokens = [0.0] * len(widths)
        self._rows = [0.0] * len(widths)
        self._expected = self._hoped = tuple(self._guesses)
        self._is_stale = False
        self._square_error = ERROR**2  # of one span, relative

    @property
    def expected(self) -> Sequence[Gain]:
        """For each width what is to be expected of it."""
        self._refresh()
        return self._expected

    @property
    def hoped(self) -> Sequence[Gain]:
        """The same, at the best that is possible where too little is known."""
        self._refresh()
        return self._hoped

    def known(self, index: int) -> bool:
        """Whether enough is known of a width; all that there is to know of a single draft is."""
        if self._is_single(index):
            return True
        return self._weights[index] >= KNOWN * self._unit

    def tried(self, index: int) -> bool:
        """Whether a width need not be tried any longer."""
        return self._weights[index] >= ENOUGH * self._unit

    def seen_tokens(self, index: int) -> float:
        """Return what steps of a width have brought, which must have run, whatever is guessed.

        Each session asks after each span, so this is the cheap answer.
        """
        return self._tokens[index] / self._steps[index]

    def note(self, index: int, span: Span) -> None:
        """Take a span of a width into account."""
        if self.known(index) and self._tokens[index]:
            error = span.tokens / (span.steps * self.seen_tokens(index)) - 1.0
            self._square_error += (min(1.0, error**2) - self._square_error) / ERROR_SPANS
        self._unit *= 1.0 + FORGET
        self._weights[index] += self._unit
        self._steps[index] += self._unit * span.steps
        self._tokens[index] += self._unit * span.tokens
        self._rows[index] += self._unit * span.rows
        self._is_stale = True
        if self._unit > TOO_LARGE:
            for sums in (self._weights, self._steps, self._tokens, self._rows):
                sums[:] = [value / self._unit for value in sums]
            self._unit = 1.0

    def _is_single(self, index: int) -> bool:
        """Whether the width is a single draft, which is what the model says next."""
        return self._verifies and index == 0 and len(self._guesses) > 1

    def _refresh(self) -> None:
        if not self._is_stale:
            return
        self._is_stale = False
        numbers = range(len(self._guesses))
        by_weight = sorted(numbers, key=self._weights.__getitem__, reverse=True)
        best, *others = by_weight
        pace, other_pace = self._pace(best), self._pace(others[0] if others else best)
        self._expected = tuple(
            [self._expect(index, other_pace if index == best else pace) for index in numbers]
        )
        self._hoped = tuple(map(self._hope, numbers))

    def _expect(self, index: int, pace: Gain | None) -> Gain:
        """Return what was seen; the less that is, the more what the others let guess.

        Args:
            index: of the width.
            pace: of that of the others of which most is known; its own where it is the only one.
        """
        weight = self._weights[index] / self._unit
        if self._is_single(index):
            return self._guesses[index]
        guess = self._guesses[index]
        if pace is not None:
            guess = Gain(self._laws[index].tokens(pace.tokens), guess.rows * pace.rows)
        if weight < SEEN:
            return guess
        steps, prior = self._steps[index], GUESS / (weight + GUESS)
        tokens, rows = self._tokens[index] / steps, self._rows[index] / steps
        return Gain(tokens + (guess.tokens - tokens) * prior, rows + (guess.rows - rows) * prior)

    def _pace(self, index: int) -> Gain | None:
        """Return the speed that a width fills at, and its rows by the guess; None if unknown."""
        if self._weights[index] < SEEN * self._unit:
            return None
        steps = self._steps[index]
        speed = self._laws[index].speed(self._tokens[index] / steps)
        return Gain(speed, self._rows[index] / (steps * self._guesses[index].rows))

    def _hope(self, index: int) -> Gain:
        """Return what a width may well bring: where it is unknown, the most that others allow.

        One that had bad luck when it was tried is thus tried again, and left the sooner the worse
        it is.
        """
        gain = self._expected[index]
        if self._is_single(index):
            return gain
        if self.known(index):
            spans = self._weights[index] / self._unit
            return Gain(gain.tokens * (1.0 + LUCK * (self._square_error / spans) ** 0.5), gain.rows)
        wider = [other for other in range(index + 1, len(self._guesses)) if self.known(other)]
        tokens = gain.tokens * HOPE
        if wider:  # which brings no less
            most = self._expected[wider[0]].tokens
            is_new = self._weights[index] < SEEN * self._unit
            tokens = most if is_new else min(tokens, most)
        return Gain(max(tokens * DOUBT, gain.tokens), gain.rows)
