"""BlockDecoder: one answer, block by block, as a pure state machine: windows out, proposals in.

Owns the canvas: which blocks exist, which positions are filled, what is final. Knows nothing of
models, batches, text or time. The loop is Algorithm 2 of the D2F paper (arXiv 2508.09192) as its
public code runs it, with these departures, each behind a field of GenerationParams: the answer
stops at its first EOS (`stop_at_eos`), the last block is cut instead of left out (`tail`), and the
number of unfilled blocks is bounded (`max_active_blocks`). What D2F is compared with runs here too:
with `attention="full"` each window is the whole canvas to come, as one attention block.

Verified answers have a decoder of their own, `DraftDecoder`.
"""

from collections import deque
from collections.abc import Collection, Sequence
from typing import Literal

from d2f_runtime.decoding.acceptance import Acceptance
from d2f_runtime.decoding.answer_decoder import AnswerDecoder
from d2f_runtime.decoding.blocks import Accepted, Block, BlockView, Committed, Edited
from d2f_runtime.decoding.continuation import check_committed
from d2f_runtime.decoding.editing import Editing
from d2f_runtime.decoding.open_blocks import OpenBlocks
from d2f_runtime.decoding.partition import Partition, PromptAttention
from d2f_runtime.decoding.policy import AcceptancePolicy
from d2f_runtime.decoding.width import OWN, Width
from d2f_runtime.decoding.window import Proposals, Window
from d2f_stream.core.errors import InvalidParams
from d2f_stream.core.params import GenerationParams

__all__ = ["Accepted", "BlockDecoder", "BlockView", "Committed", "Edited"]


class BlockDecoder(AnswerDecoder):
    """Decodes one answer, step by step.

    Call `next_window`, run it, hand the proposals to `apply`; until `next_window` returns None.

    Args:
        prompt_tokens: canvas positions 0..P.
        params: thresholds, lengths and parity switches.
        mask_id: id of the mask token.
        eos_ids: every id that ends the answer.
        shift_logits: whether row i-1 predicts position i; such a model cannot fill position 0. The
            schedule is the same either way, save for sub-blocks.
        prompt_attention: how the prompt is cut into attention blocks; see `Partition.of`.
        commit_attention: "block" caches answer blocks as they were denoised, "causal" by rows that
            see what is before them alone.
        native_block_size: of the grid; unused otherwise.
        policy: what to accept; by default the fixed count or the threshold of `params`.

    Raises:
        InvalidPrompt: the prompt holds the mask id, or is empty where position 0 cannot be filled.
        InvalidParams: `max_new_tokens` leaves no whole block on the grid and `tail` is "drop"; or
            full attention is asked of a model that is not bidirectional.
    """

    def __init__(
        self,
        *,
        prompt_tokens: Sequence[int],
        params: GenerationParams,
        mask_id: int,
        eos_ids: Collection[int],
        shift_logits: bool = False,
        prompt_attention: PromptAttention = "full",
        commit_attention: Literal["block", "causal"] = "block",
        native_block_size: int | None = None,
        policy: AcceptancePolicy | None = None,
    ) -> None:
        super().__init__(
            prompt_tokens, params, mask_id=mask_id, eos_ids=eos_ids, shift_logits=shift_logits
        )
        self._acceptance = Acceptance(params, policy=policy, shift_logits=shift_logits)
        self._truncates = params.stop_at_eos == "truncate"
        self._sees_all = params.attention == "full"
        # With full attention what comes before an EOS sees what comes after: all goes on as it was.
        self._drops = self._truncates and not self._sees_all
        if self._sees_all and prompt_attention != "full":
            allowed = f"'blocks' for a model with {prompt_attention} attention"
            raise InvalidParams("attention", params.attention, allowed)
        self._commits_causally = commit_attention == "causal"
        is_causal = prompt_attention == "causal" and (
            self._commits_causally or params.block_size == 1
        )
        self._editing = Editing.of(params, shift_logits=shift_logits)
        # Whether blocks of the answer are cached by rows that see what a prompt's would.
        self._extends_prompt = prompt_attention == "grid" or is_causal
        self._partition = Partition.of(
            self._num_prompt, params, prompt_attention, native_block_size
        )
        self._given: deque[tuple[int, ...]] = deque()  # blocks that are final and not on the canvas
        self._blocks = OpenBlocks(params, self._partition, self._acceptance)
        self._eos: int | None = None  # canvas position of the first EOS so far

    def go_on(
        self, committed: Sequence[Committed], *, num_steps: int, at_once: bool = True
    ) -> None:
        """Begin behind the first blocks of the answer, which another decoder of it committed.

        Before the first window.

        Args:
            committed: from the answer's first on.
            num_steps: that were taken for them; `num_steps` counts on from there.
            at_once: whether the first window holds them all, to be cached behind the prompt. Else
                each has a window to itself, the one in which it once joined, so that its K/V are
                cached amid what they were.

        Raises:
            InvalidRequest: a decoder of the same request would not have committed them.
        """
        partition, eos_ids = self._partition, self._eos_ids
        check_committed(committed, partition, mask_id=self._mask_id, eos_ids=eos_ids)
        answer = [token for block in committed for token in block.tokens]
        self._committed += len(answer)
        self._num_steps = self._num_steps_before = num_steps
        if answer and answer[-1] in eos_ids:
            self._eos = self._committed - 1
        if self._committed == partition.limit:  # what was denoised behind it is not needed
            answer += [answer[-1]] * (partition.end - partition.limit)
        elif self._eos is None and not (at_once or self._sees_all):
            self._given.extend(block.tokens for block in committed)
            return
        self._canvas += answer

    @property
    def cached_tokens(self) -> tuple[int, ...]:
        """The tokens whose stored K/V are those that a prompt which begins with them would have."""
        number = self._num_cached
        return tuple(
            self._canvas[: number if self._extends_prompt else min(number, self._num_prompt)]
        )

    def next_window(self, width: Width = OWN) -> Window | None:
        """Begin a step: return the window to run, None once finished.

        May append a block first. Called again before `apply`, it returns the same window.

        Args:
            width: tightens the bounds of the request for this step.
        """
        if self._pending is None and not self.finished:
            if self._may_append(width.max_active_blocks):
                length = len(self._canvas)
                stop = self._blocks.join(length, None if self._given else width.part_size)
                self._canvas.extend([self._mask_id] * (stop - length))
            self._pending = self._window()
        return self._pending

    def apply(self, proposals: Proposals) -> list[Accepted | Edited | Committed]:
        """End the step: accept from the proposals for the pending window.

        Returns what was accepted, by position, and what was edited, followed by the blocks that
        became final, in order.

        Raises:
            RuntimeError: an internal error: the proposals do not belong to the window, or name the
                mask id; or the policy broke its contract. The decoder is unusable after it.
        """
        accepted: list[Accepted] = []
        window = self._end_step(proposals)
        self._num_cached += window.num_to_cache
        self._blocks.note_cached(self._num_cached)
        if self._given:
            given, block = self._given.popleft(), self._blocks.retire()
            self._canvas[block.stop - len(given) : block.stop] = given
            self._num_steps -= 1  # it was taken where the block was committed
            return []
        if self._editing is not None:
            edited = self._revise(self._editing, proposals, window.start, accepted)
            return [*accepted, *edited, *self._commit()]
        fully_activated = True  # what precedes the first unfilled block is filled
        for block in self._blocks:
            activated = fully_activated
            fully_activated = block.progress >= self._params.activate_threshold
            if block.masked:
                self._accept(block, proposals, window.start, activated, accepted)
            if self._drops and self._eos is not None and self._eos < block.stop:
                del self._canvas[block.stop :]
                self._blocks.drop_after(block)
                break
        return [*accepted, *self._commit()]

    @property
    def finished(self) -> bool:
        """Whether no further step is needed."""
        if self._has_ended and self._truncates:
            return True
        return not self._blocks and self._is_whole

    @property
    def end(self) -> int:
        """How long the canvas may become, tokens."""
        return self._partition.end

    @property
    def answer_tokens(self) -> tuple[int, ...]:
        """All answer positions so far, masks and what follows an EOS in its block included."""
        return tuple(self._canvas[self._num_prompt : self._partition.limit])

    @property
    def active_blocks(self) -> tuple[BlockView, ...]:
        """The blocks not committed yet, filled ones that wait for an earlier one included."""
        if self._has_ended:
            return ()
        views: list[BlockView] = []
        start, limit = self._committed, self._partition.limit
        while start < min(len(self._canvas), limit):
            index, _, stop = self._partition.block_at(start)
            stop = min(stop, limit)
            tokens = self._canvas[start:stop]
            tokens += [self._mask_id] * (stop - start - len(tokens))
            views.append(self._view(index, start, tokens))
            start = stop
        return tuple(views)

    @property
    def _has_ended(self) -> bool:
        return self._eos is not None and self._eos < self._committed

    @property
    def _is_whole(self) -> bool:
        """Whether no block joins any more."""
        if self._eos is not None and not self._sees_all:
            return True
        return len(self._canvas) == self._partition.end

    def _may_append(self, max_active_blocks: int | None) -> bool:
        if self._is_whole:
            return False
        if (self._editing is not None or self._given) and self._blocks:
            return False  # what is filled may change
        return self._blocks.lets_join(max_active_blocks)

    def _window(self) -> Window:
        if self._sees_all:
            end = self._partition.end
            masks = [self._mask_id] * (end - len(self._canvas))
            return Window(0, (*self._canvas, *masks), 0, (end,))
        start, last = self._num_cached, self._blocks.last
        stop = last.start + 1 if self._acceptance.awaits_first(last) else last.stop
        clean = self._blocks.first.start
        causal_until = clean if self._commits_causally else 0
        block_stops = self._blocks.stops(start, stop, causal_until=causal_until)
        tokens = tuple(self._canvas[start:stop])
        num_to_edit = stop - max(last.start, self._num_prompt) if self._editing is not None else 0
        return Window(start, tokens, clean - start, block_stops, num_to_edit=num_to_edit)

    def _accept(
        self,
        block: Block,
        proposals: Proposals,
        start: int,
        fully_activated: bool,
        accepted: list[Accepted],
    ) -> None:
        offsets = self._acceptance.offsets(block, proposals, start, fully_activated=fully_activated)
        for offset in offsets:
            position = block.start + offset
            self._fill(position, proposals.tokens[position - start], accepted)
        block.unmask(offsets)

    def _revise(
        self, editing: Editing, proposals: Proposals, start: int, accepted: list[Accepted]
    ) -> list[Edited]:
        """Accept into the open block and edit what was set before, by the same proposals."""
        block = self._blocks.first
        first, stop, had_masks = block.start - start, block.stop - start, bool(block.masked)
        tokens = proposals.tokens[first:stop]
        offsets = editing.offsets(
            block,
            self._canvas[block.start : block.stop],
            tokens,
            proposals.confidence[first:stop],
            num_fixed=max(self._num_prompt - block.start, 0),
        )
        if had_masks:
            self._accept(block, proposals, start, True, accepted)
        edited: list[Edited] = []
        for offset in offsets:
            self._canvas[block.start + offset] = tokens[offset]
            edited.append(Edited(block.start + offset - self._num_prompt, tokens[offset]))
        stop = min(block.stop, self._partition.limit)
        ends = (at for at in range(self._committed, stop) if self._canvas[at] in self._eos_ids)
        self._eos = next(ends, None)  # one may have come or gone
        editing.end_step(block, had_masks=had_masks, was_edited=bool(edited))
        return edited

    def _fill(self, position: int, token: int, accepted: list[Accepted]) -> None:
        if token < 0:
            raise RuntimeError(f"no proposal at canvas position {position}, which holds a mask")
        self._canvas[position] = token
        # What ends behind the longest answer that is allowed ends none.
        stop = self._partition.limit if self._eos is None else self._eos
        if token in self._eos_ids and position < stop:
            self._eos = position
        accepted.append(Accepted(position - self._num_prompt, token))

    def _commit(self) -> list[Committed]:
        committed: list[Committed] = []
        final = self._blocks.first_mask
        if final is None:
            final = len(self._canvas)
        if self._editing is not None and self._blocks and not self._blocks.first.is_left:
            return committed
        while self._blocks and self._blocks.first.stop <= final:
            block = self._blocks.retire()
            is_whole = block.stop == self._partition.block_at(block.stop - 1)[2]
            if is_whole or (self._eos is not None and self._eos < block.stop):
                self._announce(block, committed)
        if self._blocks and self._eos is not None and self._eos < final:
            self._announce(self._blocks.first, committed)
        return committed

    def _announce(self, block: Block, committed: list[Committed]) -> None:
        if self._has_ended:
            return  # draining: what follows the first EOS is no part of the answer
        stop = min(block.stop, self._partition.limit)
        if self._eos is not None:
            stop = min(stop, self._eos + 1)
        committed.append(self._commit_until(stop, block.index))
