"""RunningSession: what the scheduler knows of one session, and learns of it step by step."""

from typing import Final

from d2f_runtime.decoding.width import Width
from d2f_runtime.engine.prompt_cuts import Piece, PromptCuts
from d2f_runtime.engine.request_kind import RequestKind
from d2f_runtime.engine.width_gains import Gain, Span, WidthGains

__all__ = ["RunningSession"]

OTHERS: Final = 64.0
"""Tokens of its kind that a request's own stand against, until it has more."""
SPEEDS: Final = 16
"""Speeds that are told from each other, of those up to that of the kind."""


class RunningSession:
    """One session, waiting ones included.

    Attributes:
        capacity_tokens: K/V storage that it needs at most.
        gains: of its kind.
        prompt_rows: of the prompt that no step was planned for yet.
        width: number of the width that it keeps for now; None where that is to be decided.
        narrows: whether its windows may be narrower than its request's own.
        probes: whether it tries a width of which too little is known.
        speed: how many times as much as its kind its windows bring, roughly, so that many sessions
            have one in common.

    Args:
        kind: of its request.
        may_narrow: whether others may narrow its windows.
        prompt: that its first steps compute.
    """

    def __init__(
        self,
        kind: RequestKind,
        gains: WidthGains,
        *,
        capacity_tokens: int,
        prompt: PromptCuts,
        may_narrow: bool,
    ) -> None:
        self.kind = kind
        self.gains = gains
        self.capacity_tokens = capacity_tokens
        self.width: int | None = None
        self.probes = False
        self._prompt = prompt
        self.prompt_rows = prompt.num_tokens
        self.narrows = may_narrow or kind.verifies
        self._last_rows = 0
        self._last_width: Width | None = None  # of its last step
        self._begun_tokens = 0  # that may be in work since windows had another width
        self._span = Span(0, 0, 0)
        self.speed = 1.0
        self._tokens = self._expected = OTHERS

    def begin_at(self, num_cached: int) -> None:
        """Take so many of the prompt's tokens as stored."""
        self.prompt_rows = max(0, self._prompt.num_tokens - num_cached)

    def begin_anew(self) -> None:
        """Forget that it ran: its slot was taken."""
        self._last_rows = 0
        self.prompt_rows = self._prompt.num_tokens

    def piece(self, max_tokens: int, *, choice: int, room: float) -> Piece:
        """Return the next piece of its prompt, cut so that a last one leaves room to its window.

        Args:
            max_tokens: of the piece; more where it cannot be cut so near.
            choice: number of the width of that window.
            room: rows that both may have.
        """
        start = self._prompt.num_tokens - self.prompt_rows
        window = self.next_rows(choice)
        return self._prompt.piece_within(start, max_tokens, window=window, room=room)

    def decided(self, *, is_alone: bool) -> int | None:
        """Return the number of the width that it has now; None where that is to be decided."""
        own = len(self.kind.widths) - 1
        if not self.narrows or own == 0 or (is_alone and not self.kind.verifies):
            return own
        return self.width

    def gain(self, choice: int, *, hopes: bool) -> Gain:
        """Return what a step of the width brings: as its kind does, or more, as it did before."""
        gain = (self.gains.hoped if hopes else self.gains.expected)[choice]
        if self.speed == 1.0:
            return gain
        if self.kind.verifies:  # a step brings a token in any case
            return Gain(1.0 + max(0.0, gain.tokens - 1.0) * self.speed, gain.rows)
        return Gain(gain.tokens * self.speed, gain.rows)

    def next_rows(self, choice: int) -> float:
        """Return the rows of its next window: those of the last one, if it has its width."""
        if self._last_rows and choice == self.width:
            return self._last_rows
        return self.gains.expected[choice].rows

    def learn(self, width: Width, *, rows: int, tokens: int) -> bool:
        """Take a step into account; return whether it ended a span of one width.

        Args:
            width: that the step was planned with.
            rows: that it ran, a prompt's left out.
            tokens: that were committed by it.
        """
        rows = max(1, rows)  # one token's row is a prompt's last
        self._last_rows = rows
        if self._last_width is not None and self._last_width != width:
            self._begun_tokens = self._in_work(self._last_width)
        self._last_width = width
        steps, so_far, ran = self._span
        self._span = Span(steps + 1, so_far + tokens, ran + rows)
        if not tokens:
            return False
        # What windows of another width had begun is no merit, or fault, of this one.
        span, is_pure = self._span, self._begun_tokens == 0
        self._begun_tokens = max(0, self._begun_tokens - tokens)
        self._span = Span(0, 0, 0)
        if is_pure:
            choice = self.kind.widths.index(width)
            self._note_speed(choice, span)
            self.gains.note(choice, span)
        return is_pure

    def _in_work(self, width: Width) -> int:
        """Return how many tokens may be begun at once in windows of a width."""
        if self.kind.verifies:
            return 1
        blocks = width.max_active_blocks or self.kind.params.max_active_blocks or 1
        return blocks * (width.part_size or self.kind.block_size)

    def _note_speed(self, choice: int, span: Span) -> None:
        if not (self.narrows and self.gains.known(choice)):
            return
        if self.kind.verifies and choice == 0:
            return  # a single draft brings one token, whatever its request is
        floor = span.steps if self.kind.verifies else 0
        expected = self.gains.seen_tokens(choice) * span.steps - floor
        if expected > 0:
            self._tokens += max(0, span.tokens - floor)
            self._expected += expected
        if self._expected > 4 * OTHERS:  # older spans count less
            self._tokens = (self._tokens + OTHERS) / 2
            self._expected = (self._expected + OTHERS) / 2
        self.speed = max(1, round(SPEEDS * self._tokens / self._expected)) / SPEEDS
