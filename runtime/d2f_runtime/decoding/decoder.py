"""BlockDecoder: one answer, block by block, as a pure state machine: windows out, proposals in.

Owns the canvas: which blocks exist, which positions are filled, what is final. Knows nothing of
models, batches, text or time. The loop is Algorithm 2 of the D2F paper (arXiv 2508.09192) as its
public code runs it, with these departures, each behind a field of GenerationParams: the answer
stops at its first EOS (`stop_at_eos`), the last block is cut instead of left out (`tail`), and the
number of unfilled blocks is bounded (`max_active_blocks`). What D2F is compared with runs here too:
with `attention="full"` each window is the whole canvas to come, as one attention block.

Verified answers have a decoder of their own, `DraftDecoder`.
"""

from collections.abc import Collection, Sequence
from typing import Literal

from d2f_runtime.decoding.blocks import (
    Accepted,
    Block,
    BlockView,
    Committed,
    Edited,
    SubBlocks,
)
from d2f_runtime.decoding.editing import check_editable, edits_of, is_left
from d2f_runtime.decoding.partition import Partition, PromptAttention
from d2f_runtime.decoding.policy import AcceptancePolicy, policy_of
from d2f_runtime.decoding.schedule import shares
from d2f_runtime.decoding.width import OWN, Width
from d2f_runtime.decoding.window import Proposals, Window, check_proposals
from d2f_stream.core.errors import InvalidParams, InvalidPrompt
from d2f_stream.core.params import GenerationParams

__all__ = ["Accepted", "BlockDecoder", "BlockView", "Committed", "Edited"]


class BlockDecoder:
    """Decodes one answer, step by step.

    Call `next_window`, run it, hand the proposals to `apply`; until `next_window` returns None.

    Args:
        prompt_tokens: canvas positions 0..P.
        params: thresholds, lengths and parity switches.
        mask_id: id of the mask token.
        eos_ids: every id that ends the answer.
        shift_logits: whether row i-1 predicts position i; such a model cannot fill position 0. The
            schedule is the same either way, save for sub-blocks.
        prompt_attention: how the prompt is cut into attention blocks: "full" is one block, "causal"
            one per position; answer blocks of `params.block_size` follow from P on. With "grid"
            all blocks, of attention and of decoding, lie on multiples of `native_block_size`
            (`params.block_size` plays no part): the prompt's whole blocks are cached, the rest
            stands filled at the head of the first answer block. "prompt_grid" is a grid that ends
            with the prompt, whose first block may be shorter.
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
        self._params = params
        self._mask_id = mask_id
        self._eos_ids = frozenset(eos_ids)
        self._policy = policy or policy_of(params)
        first_alone = shift_logits and params.sub_block_size > 0
        self._sub_blocks = SubBlocks(params.sub_block_size, first_alone)
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
        self._edits = params.edit_threshold is not None
        if self._edits:
            check_editable(params, shift_logits=shift_logits)
        # Whether blocks of the answer are cached by rows that see what a prompt's would.
        self._extends_prompt = prompt_attention == "grid" or is_causal
        self._canvas = list(prompt_tokens)
        self._check_prompt(shift_logits)
        self._partition = Partition.of(
            len(self._canvas), params, prompt_attention, native_block_size
        )
        self._num_prompt = len(self._canvas)
        self._num_cached = 0
        self._blocks: list[Block] = []  # from the first unfilled one to the end of the canvas
        self._committed = self._num_prompt  # canvas position up to which all is final
        self._eos: int | None = None  # canvas position of the first EOS so far
        self._num_steps = 0
        self._pending: Window | None = None

    def begin_at(self, num_cached: int) -> None:
        """Take the first positions of the prompt as cached; before the first window.

        Raises:
            RuntimeError: an internal error: a step was taken, or it is more than the prompt.
        """
        if self._num_steps or self._pending is not None or not 0 <= num_cached <= self._num_prompt:
            raise RuntimeError(f"{num_cached} tokens of {self._num_prompt} cannot be cached now")
        self._num_cached = num_cached

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
                self._append_block()
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
        window = self._pending
        if window is None:
            raise RuntimeError("proposals came, but no window is pending")
        check_proposals(window, proposals, mask_id=self._mask_id, rank=self._params.rank)
        accepted: list[Accepted] = []
        self._pending = None
        self._num_steps += 1
        self._num_cached += window.num_to_cache
        if self._edits:
            edited = self._revise(self._blocks[0], proposals, window.start, accepted)
            return [*accepted, *edited, *self._commit()]
        fully_activated = True  # what precedes the first unfilled block is filled
        for block in self._blocks:
            activated = fully_activated
            fully_activated = block.progress >= self._params.activate_threshold
            if block.masked:
                self._accept(block, proposals, window.start, activated, accepted)
            if self._drops and self._eos is not None and self._eos < block.stop:
                self._drop_after(block)
                break
        return [*accepted, *self._commit()]

    @property
    def finished(self) -> bool:
        """Whether no further step is needed."""
        if self._ended and self._truncates:
            return True
        return not self._blocks and self._is_whole

    @property
    def end(self) -> int:
        """How long the canvas may become, tokens."""
        return self._partition.end

    @property
    def finish_reason(self) -> Literal["eos", "length"] | None:
        """Why the answer ended; None before that."""
        if not self.finished:
            return None
        return "eos" if self._ended else "length"

    @property
    def num_steps(self) -> int:
        """Number of steps applied."""
        return self._num_steps

    @property
    def num_cached(self) -> int:
        """Number of leading canvas positions whose K/V is stored."""
        return self._num_cached

    @property
    def num_useful_tokens(self) -> int:
        """Number of committed tokens, to the first EOS, included."""
        return self._committed - self._num_prompt

    @property
    def answer_tokens(self) -> tuple[int, ...]:
        """All answer positions so far, masks and what follows an EOS in its block included."""
        return tuple(self._canvas[self._num_prompt : self._partition.limit])

    @property
    def active_blocks(self) -> tuple[BlockView, ...]:
        """The blocks not committed yet, filled ones that wait for an earlier one included."""
        return () if self._ended else tuple(map(self._view, self._blocks))

    @property
    def _ended(self) -> bool:
        return self._eos is not None and self._eos < self._committed

    def _check_prompt(self, shift_logits: bool) -> None:
        if shift_logits and not self._canvas:
            raise InvalidPrompt(
                "the prompt is empty, but this model predicts from the token before"
            )
        if self._mask_id in self._canvas:
            at = self._canvas.index(self._mask_id)
            raise InvalidPrompt(f"the prompt holds the mask id {self._mask_id} at position {at}")

    @property
    def _is_whole(self) -> bool:
        """Whether no block joins any more."""
        if self._eos is not None and not self._sees_all:
            return True
        return len(self._canvas) == self._partition.end

    def _may_append(self, max_active_blocks: int | None) -> bool:
        if self._is_whole:
            return False
        if self._edits and self._blocks:
            return False  # what is filled may change
        if not self._blocks:
            return True  # whatever the bound: every window must hold a mask
        if self._blocks[-1].progress < self._params.add_threshold:
            return False
        num_unfilled = sum(1 for block in self._blocks if block.masked)
        bounds = (self._params.max_active_blocks, max_active_blocks)
        return all(bound is None or num_unfilled < bound for bound in bounds)

    def _append_block(self) -> None:
        length = len(self._canvas)
        index, start, stop = self._partition.block_at(length)  # on a grid it may hold prompt too
        params, masked = self._params, list(range(length - start, stop - start))
        due: tuple[int, ...] = ()
        if params.steps_per_block:
            size = self._partition.block_size
            due = shares(params.schedule, params.steps_per_block, size, len(masked))
        self._blocks.append(Block(index, start, stop, masked, due))
        self._canvas.extend([self._mask_id] * (stop - length))

    def _window(self) -> Window:
        if self._sees_all:
            end = self._partition.end
            masks = [self._mask_id] * (end - len(self._canvas))
            return Window(0, (*self._canvas, *masks), 0, (end,))
        start, last = self._num_cached, self._blocks[-1]
        stop = last.start + 1 if self._awaits_first(last) else last.stop
        clean = self._blocks[0].start
        block_stops = self._partition.stops(
            start, stop, causal_until=clean if self._commits_causally else 0
        )
        tokens = tuple(self._canvas[start:stop])
        num_to_edit = stop - max(last.start, self._num_prompt) if self._edits else 0
        return Window(start, tokens, clean - start, block_stops, num_to_edit=num_to_edit)

    def _awaits_first(self, block: Block) -> bool:
        """Whether only the first position may accept, which sees nothing of the rest."""
        return self._sub_blocks.first_alone and block.is_untouched

    def _accept(
        self,
        block: Block,
        proposals: Proposals,
        base: int,
        fully_activated: bool,
        accepted: list[Accepted],
    ) -> None:
        first, stop = block.start - base, block.stop - base
        confidence = _by_offset(proposals.confidence, first, stop)
        rank = confidence
        if proposals.rank is not None:
            rank = _by_offset(proposals.rank, first, stop)
        if self._params.rank == "position":
            rank = range(0, first - stop, -1)
        masked, policy = self._sub_blocks.open(block.masked), self._policy
        if len(proposals.tokens) < stop:  # drafts beyond the window were not asked for
            masked = [offset for offset in masked if first + offset < len(proposals.tokens)]
            if not masked:
                return
        if block.shares and fully_activated:
            policy = policy_of(self._params, least=block.next_share())
        offsets = policy.accept(masked, confidence, rank, fully_activated=fully_activated)
        if not offsets:
            if fully_activated:
                raise RuntimeError("the policy accepted nothing in a fully activated block")
            return
        for offset in offsets:
            self._fill(block.start + offset, proposals.tokens[first + offset], accepted)
        block.unmask(offsets)

    def _revise(
        self, block: Block, proposals: Proposals, base: int, accepted: list[Accepted]
    ) -> list[Edited]:
        """Accept into the open block and edit what was set before, by the same proposals."""
        threshold = self._params.edit_threshold
        assert threshold is not None
        first, stop, had_masks = block.start - base, block.stop - base, bool(block.masked)
        tokens = proposals.tokens[first:stop]
        offsets = edits_of(
            block,
            self._canvas[block.start : block.stop],
            tokens,
            proposals.confidence[first:stop],
            num_fixed=max(self._num_prompt - block.start, 0),
            threshold=threshold,
        )
        if had_masks:
            self._accept(block, proposals, base, True, accepted)
        edited: list[Edited] = []
        for offset in offsets:
            self._canvas[block.start + offset] = tokens[offset]
            edited.append(Edited(block.start + offset - self._num_prompt, tokens[offset]))
        ends = (
            at for at in range(self._committed, block.stop) if self._canvas[at] in self._eos_ids
        )
        self._eos = next(ends, None)  # one may have come or gone
        block.is_left = is_left(
            block,
            had_masks=had_masks,
            was_edited=bool(edited),
            max_steps=self._params.max_edit_steps,
        )
        return edited

    def _fill(self, position: int, token: int, accepted: list[Accepted]) -> None:
        if token < 0:
            raise RuntimeError(f"no proposal at canvas position {position}, which holds a mask")
        self._canvas[position] = token
        if token in self._eos_ids and (self._eos is None or position < self._eos):
            self._eos = position
        accepted.append(Accepted(position - self._num_prompt, token))

    def _drop_after(self, block: Block) -> None:
        if len(self._canvas) > block.stop:
            del self._canvas[block.stop :]
            del self._blocks[self._blocks.index(block) + 1 :]

    def _commit(self) -> list[Committed]:
        committed: list[Committed] = []
        final = self._first_mask
        if self._edits and self._blocks and not self._blocks[0].is_left:
            return committed
        while self._blocks and self._blocks[0].stop <= final:
            self._announce(self._blocks.pop(0), committed)
        if self._blocks and self._eos is not None and self._eos < final:
            self._announce(self._blocks[0], committed)
        return committed

    @property
    def _first_mask(self) -> int:
        """Canvas position of the first mask; without any, where the canvas ends."""
        masks = (block.start + block.masked[0] for block in self._blocks if block.masked)
        return next(masks, len(self._canvas))

    def _announce(self, block: Block, committed: list[Committed]) -> None:
        if self._ended:
            return  # draining: what follows the first EOS is no part of the answer
        start, stop = self._committed, min(block.stop, self._partition.limit)
        if self._eos is not None:
            stop = min(stop, self._eos + 1)
        self._committed = stop
        tokens = tuple(self._canvas[start:stop])
        start, stop = start - self._num_prompt, stop - self._num_prompt
        committed.append(Committed(block.index, start, stop, tokens))

    def _view(self, block: Block) -> BlockView:
        num_prompt = self._num_prompt
        start, stop = max(block.start, num_prompt), min(block.stop, self._partition.limit)
        tokens = tuple(self._canvas[start:stop])
        return BlockView(block.index, start - num_prompt, stop - num_prompt, tokens)


def _by_offset(values: Sequence[float], first: int, stop: int) -> Sequence[float]:
    """Return a block's part of a window's values; what lies before the window is 0."""
    return values[first:stop] if first >= 0 else [*[0.0] * -first, *values[:stop]]
