"""DraftDecoder: one verified answer as a pure state machine: windows out, proposals in.

Owns the canvas of a request with `commit="verify"`. Every step runs the filled positions that are
not cached yet as the autoregressive model would run them, and each of these rows predicts the next
token. A draft that it contradicts is replaced by it, and all behind it is gone. So nothing is final
that the model does not say itself, and no step brings less than one final token: drafts decide the
speed alone.

Drafts come from rows of masks. Where these stand is `DraftPlan`'s to say: behind the last verified
token, behind the drafts that the step verifies, or behind each place where these could turn out
wrong (as in TiDAR, arXiv 2511.08923), so that the next step has drafts to verify whatever comes of
this one.
"""

from collections.abc import Collection, Sequence
from typing import Final

from d2f_runtime.decoding.answer_decoder import AnswerDecoder
from d2f_runtime.decoding.blocks import Accepted, BlockView, Committed
from d2f_runtime.decoding.continuation import check_committed
from d2f_runtime.decoding.draft_plan import DraftPlan
from d2f_runtime.decoding.partition import Partition
from d2f_runtime.decoding.width import MAX_DRAFTS, OWN, Width
from d2f_runtime.decoding.window import Branch, Proposals, Window
from d2f_stream.core.params import GenerationParams

__all__ = ["DraftDecoder"]

MAX_BRANCHES: Final = 7  # the fast step has shapes for so many


class DraftDecoder(AnswerDecoder):
    """Decodes one verified answer, step by step; see `BlockDecoder`, whose interface it has.

    For models and requests that `check_verifiable` takes.

    Args:
        prompt_tokens: canvas positions 0..P, at least one.
        params: lengths, and how many masks draft at a time (`block_size`).
        mask_id: id of the mask token.
        eos_ids: every id that ends the answer.
        spare_rows: see `ModelInfo`, as for the next one.
        branches: whether there may be any.
        drafts_in_place: see `ModelFacts`; goes with no branches.

    Raises:
        InvalidPrompt: the prompt is empty or holds the mask id.
        InvalidParams: `max_new_tokens` leaves no whole block and `tail` is "drop".
    """

    def __init__(
        self,
        *,
        prompt_tokens: Sequence[int],
        params: GenerationParams,
        mask_id: int,
        eos_ids: Collection[int],
        spare_rows: int = 8,
        branches: bool = False,
        drafts_in_place: bool = False,
    ) -> None:
        super().__init__(prompt_tokens, params, mask_id=mask_id, eos_ids=eos_ids, shift_logits=True)
        self._plan = DraftPlan(params.block_size, spare_rows, MAX_BRANCHES if branches else 0)
        # The canvas holds prompt and verified tokens; the drafts follow it.
        self._partition = Partition.of(self._num_prompt, params, "causal", None)
        self._drafts_in_place = drafts_in_place
        self._drafts: list[int] = []
        self._confidence: list[float] = []  # of the drafts
        self._ended = False

    def go_on(
        self, committed: Sequence[Committed], *, num_steps: int, at_once: bool = True
    ) -> None:
        """Begin behind the first blocks of the answer, at once; see `BlockDecoder.go_on`."""
        del at_once  # its rows are cached one by one in any case
        partition, eos_ids = self._partition, self._eos_ids
        check_committed(committed, partition, mask_id=self._mask_id, eos_ids=eos_ids)
        self._canvas += [token for block in committed for token in block.tokens]
        self._committed = len(self._canvas)
        self._num_steps = self._num_steps_before = num_steps
        self._ended = bool(committed) and self._canvas[-1] in eos_ids

    @property
    def cached_tokens(self) -> tuple[int, ...]:
        """The tokens whose stored K/V are those that a prompt which begins with them would have."""
        return tuple(self._canvas[: self._num_cached])

    def next_window(self, width: Width = OWN) -> Window | None:
        """Begin a step: return the window to run, None once finished.

        Called again before `apply`, it returns the same window.

        Args:
            width: tightens the bounds of the request for this step.
        """
        if self._pending is None and not self.finished:
            bounds = [MAX_DRAFTS]
            if self._params.max_active_blocks is not None:
                bounds.append(self._params.max_active_blocks * self._params.block_size)
            if width.max_drafts is not None:
                bounds.append(width.max_drafts - 1)  # one is what the model says next
            self._pending = self._window(min(bounds))
        return self._pending

    def apply(self, proposals: Proposals) -> list[Accepted | Committed]:
        """End the step: keep what is right, and draft anew.

        Returns what was filled, by position, followed by the blocks that became final, in order.

        Raises:
            RuntimeError: an internal error: the proposals do not belong to the window, or name the
                mask id. The decoder is unusable after it.
        """
        window = self._end_step(proposals)
        first = len(self._canvas)
        drafted = self._drafts
        num_right = 0
        while num_right < len(drafted):
            if proposals.tokens[first + num_right - window.start] != drafted[num_right]:
                break
            num_right += 1
        edge = first + num_right
        self._canvas += drafted[:num_right]
        self._num_cached = edge
        self._drafts, self._confidence = [], []
        self._ended = num_right > 0 and self._canvas[-1] in self._eos_ids
        if not self._ended and edge < self._partition.limit:
            token = proposals.tokens[edge - window.start]
            if token < 0:
                raise RuntimeError(f"no proposal at canvas position {edge}")
            self._canvas.append(token)
            self._ended = token in self._eos_ids
            if not self._ended:
                self._draft(window, proposals, edge)
        filled = [*self._canvas[first:], *self._drafts]
        accepted = [
            Accepted(first + i - self._num_prompt, token)
            for i, token in enumerate(filled)
            if i >= len(drafted) or token != drafted[i]
        ]
        return [*accepted, *self._commit()]

    @property
    def finished(self) -> bool:
        """Whether no further step is needed."""
        return self._ended or len(self._canvas) == self._partition.limit

    @property
    def end(self) -> int:
        """How long the canvas may become, tokens."""
        return self._partition.limit

    @property
    def _has_ended(self) -> bool:
        return self._ended

    @property
    def answer_tokens(self) -> tuple[int, ...]:
        """All answer positions so far: verified tokens, then drafts."""
        return (*self._canvas[self._num_prompt :], *self._drafts)

    @property
    def active_blocks(self) -> tuple[BlockView, ...]:
        """The blocks not committed yet up to that of the next token, masks where nothing stands."""
        if self.finished:
            return ()
        known = [*self._canvas, *self._drafts]
        views: list[BlockView] = []
        start = self._committed
        while start <= len(known) and start < self._partition.limit:
            index, _, stop = self._partition.block_at(start)
            tokens = known[start:stop]
            tokens += [self._mask_id] * (stop - start - len(tokens))
            views.append(self._view(index, start, tokens))
            start = stop
        return tuple(views)

    def _window(self, max_masks: int) -> Window:
        start, first = self._num_cached, len(self._canvas)
        clean = first + len(self._drafts)
        end = self._partition.limit
        behind, wanted = self._plan.behind(self._confidence, max_masks)
        tokens = [*self._canvas[start:], *self._drafts]
        stops = [*range(start + 1, clean + 1)]
        if clean < end:
            ends = bool(self._drafts) and self._drafts[-1] in self._eos_ids
            # The last mask predicts the token behind it, where one is to come: of a position that
            # is only asked, and does not run. In place it is one draft like the others.
            num_masks = 0 if ends else min(behind, end - clean - 1)
            tokens += [self._mask_id] * (num_masks + 1)
            if num_masks and not self._drafts_in_place:
                stops.append(clean + num_masks)
            stops.append(clean + num_masks + 1)
        branches = [
            Branch(first + place, min(self._params.block_size, end - first - place - 1))
            for place in wanted
            if end - first - place > 1
        ]
        return Window(
            start,
            tuple(tokens),
            clean - start,
            tuple(stops),
            num_to_verify=len(self._drafts),
            branches=tuple(branches),
        )

    def _draft(self, window: Window, proposals: Proposals, edge: int) -> None:
        """Take over the drafts that the step made behind a canvas position, if it did."""
        if edge == window.start + window.num_to_cache:
            begin, stop = edge + 1 - window.start, len(window.tokens)
        else:
            begin = stop = len(window.tokens)
            for branch in window.branches:
                stop += branch.num_masks
                if branch.start == edge:
                    break
                begin = stop
        for entry in range(begin, stop):
            token, sure = proposals.tokens[entry], proposals.confidence[entry]
            self._confidence.append(sure)
            if not self._plan.is_worth(self._confidence, self._params.confidence_threshold):
                self._confidence.pop()
                break
            self._drafts.append(token)
            if token in self._eos_ids:
                break

    def _commit(self) -> list[Committed]:
        committed: list[Committed] = []
        known = len(self._canvas)
        while self._committed < known:
            index, _, stop = self._partition.block_at(self._committed)
            if stop > known and not self.finished:
                break
            committed.append(self._commit_until(min(stop, known), index))
        return committed
