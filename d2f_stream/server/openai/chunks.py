"""From a stream's events to the chunks of OpenAI's API, and to its whole answers. Pure.

Plain streaming: one delta for each committed block. Diffusing: each delta holds the whole text as
it stands, committed blocks and drafts, and replaces the one before; the last is the final text.
"""

from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

from d2f_stream.core.events import Block, Draft, Event, FinishReason, StreamFinished, StreamStarted
from d2f_stream.server.http.sse import DONE, data_frame
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


@dataclass(slots=True, kw_only=True)
class AnswerWriter:
    """Writes one answer.

    Attributes:
        dialect: whose shapes: chat or text completions.
        name: of the request; the answer's id is made of it.
        created: when, Unix seconds.
        model: whose answer it is.
        diffusing: whether deltas replace each other.
        include_usage: whether the last chunk holds the usage.
    """

    dialect: Dialect
    name: str
    created: int
    model: str
    diffusing: bool = False
    include_usage: bool = False
    _committed: str = ""
    _drafts: dict[int, str] = field(default_factory=dict)  # text by block
    _shown: str = ""

    def chunks(self, event: Event) -> list[Body]:
        """Return the chunks that an event makes; none where it shows nothing new."""
        match event:
            case StreamStarted():
                report = D2fReport(type="stream.started", stream=event.stream, seq=event.seq)
                return [self._chunk("", report, role="assistant")] if self.dialect == "chat" else []
            case Block():
                return [self._chunk(self._commit(event), _report_of_block(event))]
            case Draft() if self.diffusing:
                self._drafts[event.index] = event.text
                text = self._canvas()
                if text == self._shown:
                    return []
                self._shown = text
                report = D2fReport(type="block.draft", stream=event.stream, index=event.index)
                return [self._chunk(text, report)]
            case StreamFinished():
                return self._end(event)
        return []

    def frames(self, event: Event) -> bytes:
        """Return the server-sent events that an event makes; none where it shows nothing new."""
        frames = b"".join(data_frame(msgspec.json.encode(body)) for body in self.chunks(event))
        return frames + (DONE if isinstance(event, StreamFinished) else b"")

    def failure(self, error: ErrorBody) -> bytes:
        """Return the server-sent event of an answer that broke off."""
        return data_frame(msgspec.json.encode(error))

    def whole(self, blocks: list[Block], end: StreamFinished) -> bytes:
        """Return the whole answer at once."""
        return msgspec.json.encode(self.body(blocks, end))

    def body(self, blocks: list[Block], end: StreamFinished) -> Body:
        """Return the whole answer."""
        text = "".join(block.text for block in blocks)
        reason = FINISH_REASONS[end.reason]
        prefix, name, _ = OBJECTS[self.dialect]
        return Body(
            id=prefix + self.name,
            object=name,
            created=self.created,
            model=self.model,
            choices=[MessageChoice(message=AnswerMessage(content=text), finish_reason=reason)]
            if self.dialect == "chat"
            else [TextChoice(text=text, finish_reason=reason)],
            usage=TokenUsage.of(end.usage),
            d2f=_report_of_end(end),
        )

    def _commit(self, block: Block) -> str:
        self._committed += block.text
        self._drafts.pop(block.index, None)
        if not self.diffusing:
            return block.text
        self._shown = self._canvas()
        return self._shown

    def _canvas(self) -> str:
        return self._committed + "".join(text for _, text in sorted(self._drafts.items()))

    def _end(self, end: StreamFinished) -> list[Body]:
        text = self._committed if self.diffusing else None
        reason = FINISH_REASONS[end.reason]
        chunks = [self._chunk(text, _report_of_end(end), finish_reason=reason)]
        if self.include_usage:
            chunks.append(self._body([], usage=TokenUsage.of(end.usage)))
        return chunks

    def _chunk(
        self,
        text: str | None,
        report: D2fReport,
        *,
        role: str | UnsetType = UNSET,
        finish_reason: str | None = None,
    ) -> Body:
        usage = None if self.include_usage else UNSET
        if self.dialect == "text":
            choice = TextChoice(text=text or "", finish_reason=finish_reason)
            return self._body([choice], usage=usage, report=report)
        delta = Delta(role=role, content=UNSET if text is None else text)
        return self._body(
            [ChunkChoice(delta=delta, finish_reason=finish_reason)], usage=usage, report=report
        )

    def _body(
        self,
        choices: list[ChunkChoice] | list[TextChoice],
        *,
        usage: TokenUsage | UnsetType | None,
        report: D2fReport | UnsetType = UNSET,
    ) -> Body:
        prefix, _, name = OBJECTS[self.dialect]
        return Body(
            id=prefix + self.name,
            object=name,
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
