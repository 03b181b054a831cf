"""Stream: one request inside the step loop, from its prompt's ids to its terminal event.

Joins the answer's text and its events. Its other half, the denoiser, belongs to the device thread
from the first step on; what that made of a step is announced here, while the next step may be under
way. The step loop drives both: `start`, then `announce` after each step, and `end`.
"""

import functools
import time
from collections.abc import Sequence
from typing import NewType

from d2f_runtime.backends.base import Slot
from d2f_runtime.decoding.decoder import BlockView, Committed
from d2f_runtime.engine.continuation import NEW, Continuation
from d2f_runtime.engine.denoiser import Denoiser, Progress
from d2f_runtime.engine.prompt_cuts import PromptCuts
from d2f_runtime.engine.request_kind import RequestKind, least_part
from d2f_runtime.models.facts import ModelInfo
from d2f_runtime.text.detokenizer import Detokenizer
from d2f_runtime.text.tokenizer import TextCodec
from d2f_stream.core.buffer import EventBuffer
from d2f_stream.core.errors import D2FError, InvalidRequest
from d2f_stream.core.events import (
    Block,
    Draft,
    FinishReason,
    StreamFailed,
    StreamFinished,
    StreamNames,
    StreamStarted,
    Timings,
    Usage,
)
from d2f_stream.core.params import GenerationParams

__all__ = ["Stream", "StreamId"]

StreamId = NewType("StreamId", str)


class Stream:
    """Decodes one answer and puts its events into a buffer.

    Attributes:
        id: the stream's name.
        denoiser: for the device thread.
        slot: the backend's storage, while it has one; kept by the step loop.
        outcome: why the stream is to end, once that is decided; the terminal event follows.

    Args:
        before: what another engine told of the same request; its events go on from there.

    Raises:
        InvalidRequest: prompt or parameters are refused, or what was before is not of them.
    """

    def __init__(
        self,
        names: StreamNames,
        *,
        prompt_tokens: Sequence[int],
        params: GenerationParams,
        info: ModelInfo,
        codec: TextCodec,
        buffer: EventBuffer,
        before: Continuation = NEW,
    ) -> None:
        self.id = StreamId(names.stream)
        self.slot: Slot | None = None
        self.outcome: FinishReason | D2FError | None = None
        self.params = params
        self.prompt_tokens = tuple(prompt_tokens)
        self.scope = names.scope
        self._request_id = names.request
        self._info = info
        self._buffer = buffer
        self.denoiser = Denoiser(
            prompt_tokens=prompt_tokens, params=params, info=info, before=before
        )
        self._detokenizer = Detokenizer(
            decode=codec.decode, stop=tuple(params.stop), special_tokens=codec.special_tokens
        )
        self._token_texts: Detokenizer | None = None
        if params.logprobs:
            self._token_texts = Detokenizer(decode=codec.decode)
        self._piece = functools.lru_cache(maxsize=4096)(lambda token: codec.decode((token,)))
        self._drafts: dict[int, tuple[int, ...]] = {}
        self._seq = before.next_seq
        self._text_length = before.text_length
        self._num_tokens = before.num_tokens
        self._num_steps = before.num_steps
        self._before_ms = before.elapsed_ms
        self._started_at: float | None = None
        self._first_block_ms = before.first_block_ms
        self._read_again(before.blocks)

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt_tokens)

    @property
    def cached_prompt(self) -> Sequence[int]:
        """The prompt, where its K/V are stored; () where every step computes it."""
        return () if self.params.attention == "full" else self.prompt_tokens

    @property
    def prompt_cuts(self) -> PromptCuts:
        """Where the prompt may be cut, as far as its K/V are stored."""
        return PromptCuts.of(len(self.cached_prompt), self._info)

    def cached_tokens(self) -> Sequence[int]:
        """Return the tokens whose K/V the slot holds; on the device thread."""
        return self.denoiser.cached_tokens

    @property
    def capacity(self) -> int:
        """Storage that the slot needs at most, tokens."""
        return max(self.num_prompt_tokens + self.params.max_new_tokens, self.denoiser.end)

    @property
    def block_size(self) -> int:
        """What the answer is cut into, tokens: a grid has its own."""
        on_grid = self._info.prompt_attention in ("grid", "prompt_grid")
        return self._info.native_block_size if on_grid else self.params.block_size

    @property
    def kind(self) -> RequestKind:
        """What its answer fills like; with full attention every window is the whole canvas."""
        is_whole = self.params.attention == "full"
        size = self.capacity if is_whole else self.block_size
        return RequestKind.of(self.params, size, least_part=least_part(self._info, size))

    def start(self) -> None:
        """Announce the stream; the clock of its timings starts. Idempotent."""
        if self._started_at is not None:
            return
        self._started_at = time.perf_counter() - self._before_ms / 1000
        if self._seq:
            return
        self._buffer.append(
            StreamStarted(
                stream=self.id,
                seq=self._next_seq(),
                request_id=self._request_id,
                model=self._info.name,
                block_size=self.block_size,
                prompt_tokens=self.num_prompt_tokens,
            )
        )

    def show(self, blocks: Sequence[BlockView]) -> None:
        """Put drafts of blocks, unless they would say the same again."""
        for view in blocks:
            self._draft(view)

    def announce(self, progress: Progress) -> None:
        """Put the events of what a step made final; the last block sets `outcome`.

        Steps that are not announced do not count: those of a stream that has its outcome already.
        """
        self._num_steps = progress.num_steps
        committed, reason = progress.committed, progress.reason
        logprobs = progress.logprobs or [()] * len(committed)
        for block, values in zip(committed, logprobs, strict=True):
            ends = block.tokens[-1] in self._info.eos_ids  # a draining decoder goes on after it
            is_last = ends or (reason is not None and block is committed[-1])
            self._commit(block, values, is_last=is_last)
            if self._detokenizer.stopped:
                self.outcome = "stop"
                return
        self.outcome = reason
        self.show(progress.active)
        if reason is None:
            self._erase(progress.left)

    def end(self) -> None:
        """Announce the outcome as the terminal event; turn away a request that never began."""
        assert self.outcome is not None
        if isinstance(self.outcome, D2FError) and not self._seq:
            self._buffer.reject(self.outcome)
            return
        self.start()
        if isinstance(self.outcome, D2FError):
            error = self.outcome
            self._buffer.append(
                StreamFailed(
                    stream=self.id, seq=self._next_seq(), code=error.code, message=str(error)
                )
            )
            return
        self._buffer.append(
            StreamFinished(
                stream=self.id,
                seq=self._next_seq(),
                reason=self.outcome,
                text_length=self._text_length,
                usage=Usage(
                    prompt_tokens=self.num_prompt_tokens,
                    completion_tokens=self._num_tokens,
                    steps=self._num_steps,
                ),
                timings=Timings(first_block_ms=self._first_block_ms, total_ms=self._elapsed_ms()),
            )
        )

    def _read_again(self, blocks: Sequence[Block]) -> None:
        """Take the text of blocks that are out; where nothing is left to come, set `outcome`."""
        reason = self.denoiser.finish_reason
        for block in blocks:
            ends = block.token_ids[-1] in self._info.eos_ids
            is_last = ends or (reason is not None and block is blocks[-1])
            text = self._text_of(block.token_ids, is_last=is_last)
            if text != block.text:
                raise InvalidRequest(
                    f"the text of committed block {block.index} is {block.text!r:.100}, but here "
                    f"its ids make {text!r:.100}; continue an answer with the model and the stop "
                    "strings that it began with"
                )
            self._texts_of(block.token_ids, is_last=is_last)
        if blocks:
            self.outcome = "stop" if self._detokenizer.stopped else reason

    def _text_of(self, tokens: Sequence[int], *, is_last: bool) -> str:
        """Return the text that becomes stable with a block's ids."""
        text = self._detokenizer.push(tokens[:-1] if tokens[-1] in self._info.eos_ids else tokens)
        if is_last and not self._detokenizer.stopped:
            text += self._detokenizer.flush()
        return text

    def _commit(self, block: Committed, logprobs: Sequence[float], *, is_last: bool) -> None:
        tokens = block.tokens
        text = self._text_of(tokens, is_last=is_last)
        elapsed_ms = self._elapsed_ms()
        if self._first_block_ms is None:
            self._first_block_ms = elapsed_ms
        self._text_length += len(text)
        self._num_tokens += len(tokens)
        self._drafts.pop(block.index, None)
        self._buffer.append(
            Block(
                stream=self.id,
                seq=self._next_seq(),
                index=block.index,
                start=block.start,
                stop=block.stop,
                text=text,
                token_ids=tokens,
                steps=self._num_steps,
                elapsed_ms=elapsed_ms,
                logprobs=tuple(logprobs),
                texts=self._texts_of(tokens, is_last=is_last),
            )
        )

    def _texts_of(self, tokens: Sequence[int], *, is_last: bool) -> tuple[str, ...]:
        """Return what each token adds to the text, where that is asked for."""
        texts = self._token_texts
        if texts is None:
            return ()
        added = ["" if token in self._info.eos_ids else texts.push((token,)) for token in tokens]
        if is_last:
            at = -2 if len(tokens) > 1 and tokens[-1] in self._info.eos_ids else -1
            added[at] += texts.flush()
        return tuple(added)

    def _draft(self, view: BlockView) -> None:
        if self._drafts.get(view.index) == view.tokens:
            return
        self._drafts[view.index] = view.tokens
        filled = tuple(token != self._info.mask_id for token in view.tokens)
        texts = tuple(
            self._piece(token) if known else ""
            for token, known in zip(view.tokens, filled, strict=True)
        )
        self._buffer.append(
            Draft(stream=self.id, index=view.index, text="".join(texts), filled=filled, texts=texts)
        )

    def _erase(self, indices: Sequence[int]) -> None:
        """Put empty drafts of blocks that have left the canvas."""
        for index in indices:
            self._drafts.pop(index, None)
            self._buffer.append(Draft(stream=self.id, index=index, text="", filled=(), texts=()))

    def _next_seq(self) -> int:
        self._seq += 1
        return self._seq - 1

    def _elapsed_ms(self) -> float:
        assert self._started_at is not None
        return (time.perf_counter() - self._started_at) * 1000
