"""From a stream's events to the chunks of OpenAI's API, and to its whole answers. Pure.

Plain streaming: one delta for each committed block. Diffusing: each delta holds the whole text as
it stands, committed blocks and drafts, and replaces the one before; the last is the final text.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

from d2f_stream.core.events import (
    Block,
    Draft,
    Event,
    FinishReason,
    StreamFinished,
    StreamStarted,
    Usage,
)
from d2f_stream.server.http.sse import DONE, data_frame
from d2f_stream.server.openai.reader import Answer
from d2f_stream.server.openai.shapes import (
    AnswerMessage,
    Body,
    ChunkChoice,
    D2fReport,
    Delta,
    ErrorBody,
    MessageChoice,
    TextChoice,
    TokenUsage,
)
from d2f_stream.server.openai.token_logprobs import (
    Token,
    TokenLine,
    chat_logprobs,
    text_logprobs,
)

__all__ = ["AnswerWriter", "Dialect"]

Dialect = Literal["chat", "text"]

FINISH_REASONS: Final[dict[FinishReason, str]] = {
    "eos": "stop",
    "stop": "stop",
    "length": "length",
    "cancelled": "stop",
}
OBJECTS: Final[dict[Dialect, tuple[str, str, str]]] = {
    "chat": ("chatcmpl-", "chat.completion", "chat.completion.chunk"),
    "text": ("cmpl-", "text_completion", "text_completion"),
}


@dataclass(slots=True)
class _Choice:
    """What one choice has shown so far."""

    committed: str = ""
    drafts: dict[int, str] = field(default_factory=dict)  # text by block
    shown: str = ""
    tokens: TokenLine = field(default_factory=TokenLine)

    @property
    def canvas(self) -> str:
        """Committed blocks and drafts."""
        return self.committed + "".join(text for _, text in sorted(self.drafts.items()))


@dataclass(slots=True, kw_only=True)
class AnswerWriter:
    """Writes the answer to one request, of one choice or several.

    Attributes:
        dialect: whose shapes: chat or text completions.
        name: of the request; the answer's id is made of it.
        created: when, Unix seconds.
        model: whose answer it is.
        diffusing: whether deltas replace each other.
        include_usage: whether the last chunk holds the usage.
        logprobs: whether the log-probability of each token is told.
        num_choices: how many streams answer.
    """

    dialect: Dialect
    name: str
    created: int
    model: str
    diffusing: bool = False
    include_usage: bool = False
    logprobs: bool = False
    num_choices: int = 1
    _choices: dict[int, _Choice] = field(default_factory=lambda: defaultdict(_Choice))
    _usages: list[Usage] = field(default_factory=list)  # of those that have ended

    def chunks(self, event: Event, index: int = 0) -> list[Body]:
        """Return the chunks that an event of a choice makes; none where it shows nothing new."""
        choice = self._choices[index]
        match event:
            case StreamStarted() if self.dialect == "chat":
                report = D2fReport(type="stream.started", stream=event.stream, seq=event.seq)
                return [self._chunk(index, "", report, role="assistant")]
            case Block():
                tokens = choice.tokens.take(event) if self.logprobs else None
                text = self._commit(choice, event)
                return [self._chunk(index, text, _report_of_block(event), tokens=tokens)]
            case Draft() if self.diffusing:
                choice.drafts[event.index] = event.text
                text = choice.canvas
                if text == choice.shown:
                    return []
                choice.shown = text
                report = D2fReport(type="block.draft", stream=event.stream, index=event.index)
                return [self._chunk(index, text, report)]
            case StreamFinished():
                return self._end(index, event)
        return []

    def frames(self, event: Event, index: int = 0) -> bytes:
        """Return the server-sent events that an event makes; none where it shows nothing new."""
        frames = b"".join(
            data_frame(msgspec.json.encode(body)) for body in self.chunks(event, index)
        )
        return frames + (DONE if len(self._usages) == self.num_choices else b"")

    def failure(self, error: ErrorBody) -> bytes:
        """Return the server-sent event of an answer that broke off."""
        return data_frame(msgspec.json.encode(error))

    def whole(self, answers: Sequence[Answer]) -> bytes:
        """Return the whole answer at once."""
        return msgspec.json.encode(self.body(answers))

    def body(self, answers: Sequence[Answer]) -> Body:
        """Return the whole answer, of all its choices."""
        whole = [self._whole(index, *answer) for index, answer in enumerate(answers)]
        ends = [end for _, end in answers]
        usage = TokenUsage.of([end.usage for end in ends])
        report = _report_of_end(ends[0]) if len(ends) == 1 else UNSET
        return self._body(whole, usage=usage, report=report, is_whole=True)

    def _whole(
        self, index: int, blocks: list[Block], end: StreamFinished
    ) -> MessageChoice | TextChoice:
        text = "".join(block.text for block in blocks)
        reason = FINISH_REASONS[end.reason]
        tokens: list[Token] | None = None
        if self.logprobs:
            line = TokenLine()
            tokens = [token for block in blocks for token in line.take(block)] + line.end(end)
        if self.dialect == "text":
            texts = None if tokens is None else text_logprobs(tokens)
            return TextChoice(index=index, text=text, logprobs=texts, finish_reason=reason)
        return MessageChoice(
            index=index,
            message=AnswerMessage(content=text),
            logprobs=None if tokens is None else chat_logprobs(tokens),
            finish_reason=reason,
        )

    def _commit(self, choice: _Choice, block: Block) -> str:
        choice.committed += block.text
        choice.drafts.pop(block.index, None)
        if not self.diffusing:
            return block.text
        choice.shown = choice.canvas
        return choice.shown

    def _end(self, index: int, end: StreamFinished) -> list[Body]:
        choice = self._choices[index]
        text = choice.committed if self.diffusing else None
        tokens = choice.tokens.end(end) if self.logprobs else None
        reason = FINISH_REASONS[end.reason]
        report = _report_of_end(end)
        chunks = [self._chunk(index, text, report, finish_reason=reason, tokens=tokens or None)]
        self._usages.append(end.usage)
        if self.include_usage and len(self._usages) == self.num_choices:
            chunks.append(self._body([], usage=TokenUsage.of(self._usages)))
        return chunks

    def _chunk(
        self,
        index: int,
        text: str | None,
        report: D2fReport,
        *,
        role: str | UnsetType = UNSET,
        finish_reason: str | None = None,
        tokens: list[Token] | None = None,
    ) -> Body:
        usage = None if self.include_usage else UNSET
        if self.dialect == "text":
            choice = TextChoice(
                index=index,
                text=text or "",
                logprobs=None if tokens is None else text_logprobs(tokens),
                finish_reason=finish_reason,
            )
            return self._body([choice], usage=usage, report=report)
        chunk = ChunkChoice(
            index=index,
            delta=Delta(role=role, content=UNSET if text is None else text),
            logprobs=None if tokens is None else chat_logprobs(tokens),
            finish_reason=finish_reason,
        )
        return self._body([chunk], usage=usage, report=report)

    def _body(
        self,
        choices: Sequence[MessageChoice | ChunkChoice | TextChoice],
        *,
        usage: TokenUsage | UnsetType | None,
        report: D2fReport | UnsetType = UNSET,
        is_whole: bool = False,
    ) -> Body:
        prefix, whole, chunk = OBJECTS[self.dialect]
        return Body(
            id=prefix + self.name,
            object=whole if is_whole else chunk,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage,
            d2f=report,
        )


def _report_of_block(block: Block) -> D2fReport:
    return D2fReport(
        type="block.committed",
        stream=block.stream,
        seq=block.seq,
        index=block.index,
        steps=block.steps,
    )


def _report_of_end(end: StreamFinished) -> D2fReport:
    return D2fReport(
        type="stream.finished",
        stream=end.stream,
        seq=end.seq,
        steps=end.usage.steps,
        reason=end.reason,
        tokens_per_step=end.usage.tokens_per_step,
        timings=end.timings,
    )
