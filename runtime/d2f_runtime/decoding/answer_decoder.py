"""AnswerDecoder: what every decoder of an answer keeps: its canvas, and how much of it is final.

How windows are laid out and what is accepted from them is the decoders' own.
"""

from collections.abc import Collection, Sequence
from typing import Literal

from d2f_runtime.decoding.blocks import BlockView, Committed
from d2f_runtime.decoding.window import Proposals, Window, check_proposals
from d2f_stream.core.errors import InvalidPrompt
from d2f_stream.core.params import GenerationParams

__all__ = ["AnswerDecoder"]


class AnswerDecoder:
    """The base of `BlockDecoder` and `DraftDecoder`.

    Args:
        prompt_tokens: canvas positions 0..P.
        params: of the request.
        mask_id: id of the mask token.
        eos_ids: every id that ends the answer.
        shift_logits: whether row i-1 predicts position i; such a model cannot fill position 0.

    Raises:
        InvalidPrompt: the prompt holds the mask id, or is empty where position 0 cannot be filled.
    """

    def __init__(
        self,
        prompt_tokens: Sequence[int],
        params: GenerationParams,
        *,
        mask_id: int,
        eos_ids: Collection[int],
        shift_logits: bool,
    ) -> None:
        if shift_logits and not prompt_tokens:
            raise InvalidPrompt(
                "the prompt is empty, but this model predicts from the token before"
            )
        self._params = params
        self._mask_id = mask_id
        self._eos_ids = frozenset(eos_ids)
        self._canvas = list(prompt_tokens)
        if mask_id in self._canvas:
            at = self._canvas.index(mask_id)
            raise InvalidPrompt(f"the prompt holds the mask id {mask_id} at position {at}")
        self._num_prompt = len(self._canvas)
        self._num_cached = 0
        self._committed = self._num_prompt  # canvas position up to which all is final
        self._num_steps = self._num_steps_before = 0
        self._pending: Window | None = None

    def begin_at(self, num_cached: int) -> None:
        """Take the first positions of the prompt as cached; before the first window.

        Raises:
            RuntimeError: an internal error: a step was taken, or it is more than the prompt.
        """
        begun = self._num_steps > self._num_steps_before or self._pending is not None
        if begun or not 0 <= num_cached <= self._num_prompt:
            raise RuntimeError(f"{num_cached} tokens of {self._num_prompt} cannot be cached now")
        self._num_cached = num_cached

    @property
    def finished(self) -> bool:
        """Whether no further step is needed."""
        raise NotImplementedError

    @property
    def finish_reason(self) -> Literal["eos", "length"] | None:
        """Why the answer ended; None before that."""
        if not self.finished:
            return None
        return "eos" if self._has_ended else "length"

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
    def _has_ended(self) -> bool:
        """Whether an EOS is committed."""
        raise NotImplementedError

    def _end_step(self, proposals: Proposals) -> Window:
        """Return the pending window, which the proposals answer.

        Raises:
            RuntimeError: no window is pending, or the proposals are not of this one.
        """
        window = self._pending
        if window is None:
            raise RuntimeError("proposals came, but no window is pending")
        check_proposals(window, proposals, mask_id=self._mask_id, rank=self._params.rank)
        self._pending = None
        self._num_steps += 1
        return window

    def _commit_until(self, stop: int, index: int) -> Committed:
        """Make a block final up to a canvas position."""
        start, self._committed = self._committed, stop
        first = self._num_prompt
        return Committed(index, start - first, stop - first, tuple(self._canvas[start:stop]))

    def _view(self, index: int, start: int, tokens: Sequence[int]) -> BlockView:
        """Return a block that is not final, from a canvas position on."""
        first = start - self._num_prompt
        return BlockView(index, first, first + len(tokens), tuple(tokens))
