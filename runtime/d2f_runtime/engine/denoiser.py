"""Denoiser: the half of a stream that lives on the device thread, between two steps of the model.

Joins decoder and noise: windows become rows of a step, proposals become progress. Knows no text, no
events and no event loop. What it tells is values, which the event loop may read while the next step
is under way.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

from d2f_runtime.backends.base import Slot, StepRow
from d2f_runtime.decoding.decoder import Accepted, BlockDecoder, BlockView, Committed, Edited
from d2f_runtime.decoding.draft_decoder import DraftDecoder
from d2f_runtime.decoding.logprobs import TokenLogprobs
from d2f_runtime.decoding.noise import SamplingNoise
from d2f_runtime.decoding.policy import AcceptancePolicy
from d2f_runtime.decoding.verification import check_verifiable
from d2f_runtime.decoding.width import Width
from d2f_runtime.decoding.window import Proposals, Window
from d2f_runtime.engine.continuation import NEW, Continuation
from d2f_runtime.engine.prompt_cuts import Piece, PromptCuts
from d2f_runtime.models.facts import ModelInfo
from d2f_stream.core.events import FinishReason
from d2f_stream.core.params import GenerationParams

__all__ = ["Decoder", "Denoiser", "Progress", "decoder_of"]

Decoder = BlockDecoder | DraftDecoder


class Progress(NamedTuple):  # a third of a frozen dataclass's cost, between two steps
    """What one step made of one stream.

    Attributes:
        num_steps: the stream's steps so far.
        num_rows: positions that the step ran through the model for it.
        num_prompt_rows: those of them that belong to the prompt, or to what another engine
            committed, and are stored now.
        committed: blocks that became final, in order.
        reason: why the answer ended; None before that.
        active: the blocks not committed yet; () unless drafts are asked for.
        left: numbers of those that have left the canvas, since an EOS or a difference stands before
            them; () unless drafts are asked for.
        logprobs: for each committed block, those of its tokens; () unless they are asked for.
    """

    num_steps: int
    num_rows: int
    num_prompt_rows: int
    committed: Sequence[Committed]
    reason: FinishReason | None
    active: Sequence[BlockView] = ()
    left: Sequence[int] = ()
    logprobs: Sequence[Sequence[float]] = ()


class Denoiser:
    """Decodes one answer, step by step: `row`, run it, `apply`.

    Args:
        prompt_tokens: ids.
        params: of the request.
        info: of the model.
        before: what another engine made of the same request.

    Raises:
        InvalidRequest: the decoder refuses prompt, parameters or what was before.
    """

    def __init__(
        self,
        *,
        prompt_tokens: Sequence[int],
        params: GenerationParams,
        info: ModelInfo,
        before: Continuation = NEW,
    ) -> None:
        self._params = params
        self._prompt = tuple(prompt_tokens)
        self._cuts = PromptCuts.of(len(self._prompt), info)
        self._piece: Window | None = None  # of the prompt, in the step that is under way
        self._num_given = len(self._prompt) + before.num_tokens
        self._decoder = decoder_of(info, prompt_tokens, params)
        self._decoder.go_on(
            before.committed, num_steps=before.num_steps, at_once=not info.window_scaled
        )
        self._noise: SamplingNoise | None = None
        if params.temperature > 0:
            seed = params.seed
            self._noise = SamplingNoise(random.getrandbits(63) if seed is None else seed)
        self._num_joined = len(before.blocks)
        self._logprobs = TokenLogprobs(len(self._prompt)) if params.logprobs else None
        self._info = info

    def begin_at(self, num_cached: int) -> None:
        """Take the prompt's first tokens as stored already; before the first step."""
        self._decoder.begin_at(num_cached)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why no step is needed; None where some are."""
        return self._decoder.finish_reason

    @property
    def end(self) -> int:
        """How long the canvas may become, tokens."""
        return self._decoder.end

    @property
    def cached_tokens(self) -> Sequence[int]:
        """The tokens whose K/V the slot holds."""
        return self._decoder.cached_tokens

    def row(self, slot: Slot, width: Width, piece: Piece | None = None) -> StepRow:
        """Begin a step: return its row.

        Args:
            slot: of the answer.
            width: of its window.
            piece: of the prompt; None runs all of it that is left, as the last one does.

        Raises:
            RuntimeError: an internal error: the answer is finished.
        """
        if piece is not None and not piece.is_last:
            self._piece = self._window_of(piece)
            return StepRow(slot, self._piece)
        params, noise = self._params, self._noise
        window = self._decoder.next_window(width)
        # A position that is verified draws the number with which it was drafted.
        step = 0 if params.commit == "verify" else self._decoder.num_steps
        if window is None:
            raise RuntimeError("a step was asked of an answer that is finished")
        return StepRow(
            slot=slot,
            window=window,
            temperature=params.temperature,
            top_p=params.top_p,
            rank="confidence" if params.rank == "position" else params.rank,
            uniforms=None if noise is None else noise.uniforms(window, step),
            num_prompt=len(self._prompt),
        )

    def joined(self) -> Sequence[BlockView]:
        """Return the blocks that joined since the last call, all masks; () unless drafts."""
        if not self._params.drafts or self._piece is not None:
            return ()
        new = [view for view in self._decoder.active_blocks if view.index >= self._num_joined]
        if new:
            self._num_joined = new[-1].index + 1
        return new

    def apply(self, proposals: Proposals) -> Progress:
        """End the step; see `BlockDecoder.apply`."""
        decoder = self._decoder
        if self._piece is not None:
            piece, self._piece = self._piece, None
            decoder.begin_at(piece.stop)
            rows = len(piece.tokens)
            return Progress(decoder.num_steps, rows, rows, (), None)
        window = decoder.next_window()  # the pending one
        events = decoder.apply(proposals)
        committed = [event for event in events if isinstance(event, Committed)]
        reason = decoder.finish_reason
        num_rows = num_prompt_rows = 0
        if window is not None:
            info = self._info
            num_rows = window.num_forwarded(
                info.mask_id, shift_logits=info.shift_logits, drafts_in_place=info.drafts_in_place
            )
            num_rows += window.num_branch_masks
            stored = min(window.start + window.num_to_cache, self._num_given)
            num_prompt_rows = max(0, stored - window.start)
        logprobs: list[tuple[float, ...]] = []
        if self._logprobs is not None and window is not None:
            accepted = [event for event in events if isinstance(event, Accepted | Edited)]
            self._logprobs.note(window, proposals, accepted)
            logprobs = [self._logprobs.take(block.start, block.stop) for block in committed]
        made = Progress(
            decoder.num_steps, num_rows, num_prompt_rows, committed, reason, logprobs=logprobs
        )
        if not self._params.drafts:
            return made
        active = decoder.active_blocks
        last = [event.index for event in committed] + [view.index for view in active]
        stop = last[-1] + 1 if last else self._num_joined
        left = range(stop, self._num_joined)
        self._num_joined = stop
        return made._replace(active=active, left=left)

    def _window_of(self, piece: Piece) -> Window:
        start = self._decoder.num_cached
        stop = start + piece.num_tokens
        stops = self._cuts.stops(start, stop)
        return Window(start, self._prompt[start:stop], stop - start, stops)


def decoder_of(
    info: ModelInfo,
    prompt_tokens: Sequence[int],
    params: GenerationParams,
    policy: AcceptancePolicy | None = None,
) -> Decoder:
    """Return the decoder of one answer of a model.

    Args:
        info: of the model.
        prompt_tokens: ids.
        params: of the request.
        policy: instead of the one that the parameters name.

    Raises:
        InvalidRequest: the decoder refuses prompt or parameters.
    """
    if params.commit == "verify":
        check_verifiable(
            params,
            shift_logits=info.shift_logits,
            prompt_attention=info.prompt_attention,
            commit_attention=info.commit_attention,
        )
        return DraftDecoder(
            prompt_tokens=prompt_tokens,
            params=params,
            mask_id=info.mask_id,
            eos_ids=info.eos_ids,
            spare_rows=info.spare_rows,
            branches=info.branches,
            drafts_in_place=info.drafts_in_place,
        )
    return BlockDecoder(
        prompt_tokens=prompt_tokens,
        params=params,
        mask_id=info.mask_id,
        eos_ids=info.eos_ids,
        shift_logits=info.shift_logits,
        prompt_attention=info.prompt_attention,
        commit_attention=info.commit_attention,
        native_block_size=info.native_block_size,
        policy=policy,
    )
