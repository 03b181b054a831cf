"""Sequences: an example as token ids of a fixed length, padding included.

Prompt by the chat template, answer as it is, the token that ends an answer, then EOS up to the
length. The padding is an ordinary part of the answer: it is masked and learnt like the rest.
"""

from dataclasses import dataclass, field
from typing import Literal

from d2f_export.distill.examples import Example
from d2f_runtime.text.tokenizer import TextCodec
from d2f_stream.core.errors import InvalidRequest

__all__ = ["Counts", "Packing", "Sequence", "encode_prompt"]


@dataclass(frozen=True, slots=True)
class Sequence:
    """Ids of one example; the answer and its padding start at `prompt_len`."""

    tokens: tuple[int, ...]
    prompt_len: int


@dataclass(slots=True)
class Counts:
    """What became of the examples so far.

    Attributes:
        used: those that were packed.
        cut: of these, those whose answer was cut.
        dropped: those that were too long.
    """

    used: int = 0
    cut: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Packing:
    """How examples become sequences.

    Attributes:
        codec: the model's.
        end_id: ends an answer (LLaDA: eot; Dream: EOS).
        padding_id: fills the rest (EOS).
        length: of every sequence, tokens.
        overlong: what happens to longer examples.
        min_answer: room that a cut answer needs at least, tokens.
        chat_template: whether prompts go through it.
        counts: kept up to date.
    """

    codec: TextCodec
    end_id: int
    padding_id: int
    length: int
    overlong: Literal["drop", "cut"]
    min_answer: int
    chat_template: bool
    counts: Counts = field(default_factory=Counts)

    def pack(self, example: Example) -> Sequence | None:
        """Return the example as ids; None where it is too long and dropped.

        Raises:
            InvalidRequest: a chat without a template.
        """
        prompt = encode_prompt(self.codec, example, chat_template=self.chat_template)
        ids = [*prompt, *self.codec.encode(example.answer), self.end_id]
        if len(ids) > self.length:
            room = self.length - len(prompt)
            if self.overlong == "drop" or room < self.min_answer:
                self.counts.dropped += 1
                return None
            ids = ids[: self.length]
            self.counts.cut += 1
        self.counts.used += 1
        padding = [self.padding_id] * (self.length - len(ids))
        return Sequence((*ids, *padding), len(prompt))


def encode_prompt(codec: TextCodec, example: Example, *, chat_template: bool) -> list[int]:
    """Return the ids of an example's prompt.

    Raises:
        InvalidRequest: a chat without a template, or a prompt that has no tokens.
    """
    if chat_template:
        text = codec.render([{"role": m.role, "content": m.content} for m in example.messages])
    elif example.prompt is None:
        raise InvalidRequest(
            "the data holds chat messages, which need the chat template; leave chat_template on, "
            "or give lines with a prompt"
        )
    else:
        text = example.prompt
    ids = codec.encode(text)
    if not ids:
        raise InvalidRequest("a prompt of the data has no tokens; leave such lines out")
    return ids
