"""The events of a stream: msgspec Structs with a tag, frozen, the same in process and on the wire.

Durable events carry a gapless `seq` from 0 per stream and can be replayed; drafts are provisional,
may be dropped and carry none. The texts of a stream's `Block` events concatenate to its final text.
"""

import uuid
from typing import Literal, NamedTuple, Self

import msgspec

__all__ = [
    "Block",
    "Draft",
    "Event",
    "FinishReason",
    "StreamFailed",
    "StreamFinished",
    "StreamNames",
    "StreamStarted",
    "Timings",
    "Usage",
]

FinishReason = Literal["eos", "length", "stop", "cancelled"]
"""Why an answer ended: the model ended it, max_new_tokens, a stop string, or its reader."""


class StreamNames(NamedTuple):
    """What the events of one stream call it, the request that it answers, and who asked.

    Whoever knows the stream's may read it from a server, so it must be hard to guess.
    """

    stream: str
    request: str
    scope: str = ""  # who asks: what was computed for one asker is reused for that asker only

    @classmethod
    def fresh(cls) -> Self:
        """Return names that nobody else has."""
        name = uuid.uuid4().hex
        return cls(name, name)


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream consumed.

    Attributes:
        prompt_tokens: tokens of the prompt, the chat template's included.
        completion_tokens: the useful tokens of the answer, up to and including the first EOS.
        steps: forwards of the model in which the stream's blocks took part.
    """

    prompt_tokens: int
    completion_tokens: int
    steps: int

    @property
    def tokens_per_step(self) -> float:
        """Useful tokens per step (TPF); 0.0 before the first step."""
        return self.completion_tokens / self.steps if self.steps else 0.0


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Wall times of a stream, in milliseconds from the request's admission to the step loop.

    Attributes:
        first_block_ms: until the first block was final; None where none was.
        total_ms: until the end.
    """

    first_block_ms: float | None
    total_ms: float


class StreamStarted(msgspec.Struct, frozen=True, kw_only=True, tag="stream.started"):
    """The first event of every stream.

    Attributes:
        stream: id of the stream.
        seq: position among the stream's durable events: 0.
        request_id: the request's own name, as whoever asked gave it.
        model: name of the model that answers.
        block_size: of the answer's blocks, tokens.
        prompt_tokens: tokens of the prompt, the chat template's included.
    """

    stream: str
    seq: int
    request_id: str
    model: str
    block_size: int
    prompt_tokens: int


class Block(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="block.committed"):
    """A block of the answer became final.

    Attributes:
        stream: id of the stream.
        seq: position among the stream's durable events.
        index: number of the block in the answer, from 0.
        start: first position of the block in the answer, tokens.
        stop: one past its last position; up to and including the EOS where one ends the answer.
        text: what became stable with this block. Partial UTF-8 and beginnings of stop strings are
            held back and come with a later block, so it need not equal the decoded `token_ids`.
        token_ids: [stop - start] final token ids; an EOS is included.
        steps: steps the stream had taken when the block was committed.
        elapsed_ms: time since the request was admitted.
        logprobs: [stop - start] where the request asks for them: the natural logarithm of the
            probability that the model gave each token when it decided on it, given the canvas of
            that step, after temperature and top_p. -9999 stands for a probability of 0.
        texts: [stop - start] where the request asks for logprobs: what each token adds to the text;
            nothing for an EOS, or where the next token completes a character.
    """

    stream: str
    seq: int
    index: int
    start: int
    stop: int
    text: str
    token_ids: tuple[int, ...]
    steps: int
    elapsed_ms: float
    logprobs: tuple[float, ...] = ()
    texts: tuple[str, ...] = ()


class Draft(msgspec.Struct, frozen=True, kw_only=True, tag="block.draft"):
    """The provisional state of a block that is being denoised. Opt-in, droppable, never replayed.

    The first of a block comes when it joins and shows nothing but masks. One without any position
    says that the block has left the canvas, with all that it showed.

    Attributes:
        stream: id of the stream.
        index: number of the block in the answer, from 0.
        text: the pieces together.
        filled: [positions] which of them hold a token; the others are still masked.
        texts: [positions] the decoded piece of each, empty at masks, for canvases that draw
            position by position.
    """

    stream: str
    index: int
    text: str
    filled: tuple[bool, ...] = ()
    texts: tuple[str, ...] = ()


class StreamFinished(msgspec.Struct, frozen=True, kw_only=True, tag="stream.finished"):
    """The stream ended well.

    Attributes:
        stream: id of the stream.
        seq: position among the stream's durable events.
        reason: why it ended.
        text_length: length of the final text, characters.
        usage: tokens and steps.
        timings: milliseconds.
    """

    stream: str
    seq: int
    reason: FinishReason
    text_length: int
    usage: Usage
    timings: Timings


class StreamFailed(msgspec.Struct, frozen=True, kw_only=True, tag="stream.failed"):
    """The stream ended because something broke.

    Attributes:
        stream: id of the stream.
        seq: position among the stream's durable events.
        code: that of the error class, such as "engine_failed".
        message: what happened, in a sentence.
    """

    stream: str
    seq: int
    code: str
    message: str


Event = StreamStarted | Block | Draft | StreamFinished | StreamFailed
"""What `Session.events()` yields: a start, blocks, drafts where asked for, and an end."""
