"""Prompts: what may be asked of a model, and the token ids that it becomes."""

import operator
from collections.abc import Mapping, Sequence
from typing import Final

from d2f_runtime.loaded_model import ModelParts
from d2f_runtime.models.facts import ModelInfo
from d2f_runtime.text.tokenizer import TextCodec
from d2f_stream.core.errors import InvalidPrompt, PromptTooLong
from d2f_stream.core.printable import is_encodable, shown
from d2f_stream.core.session import Prompt

__all__ = ["check_size", "encode"]

SLACK: Final = 4
"""A tokenizer may drop or join characters before it cuts a text into tokens."""

ROLES: Final = ("system", "user", "assistant", "tool")
"""Of chat messages. Templates know others, or write them as they are, or leave the message out."""


def check_size(prompt: Prompt, parts: ModelParts) -> None:
    """Refuse a prompt that is too long at first sight, before it is read.

    Raises:
        PromptTooLong: it has more tokens than the model holds, whatever they are.
    """
    if not isinstance(prompt, Sequence) or not prompt:
        return
    per_token = SLACK * parts.codec.longest_token
    if isinstance(prompt, str):
        size = len(prompt)
    elif isinstance(prompt[0], Mapping):
        texts = [m.get("content") for m in prompt if isinstance(m, Mapping)]
        size = sum(len(text) for text in texts if isinstance(text, str))
    else:
        size, per_token = len(prompt), 1
    if size > parts.info.max_len * per_token:
        raise PromptTooLong(-(-size // per_token), 1, parts.info.max_len, at_least=True)


def encode(prompt: Prompt, parts: ModelParts, *, raw: bool = True) -> list[int]:
    """Return a prompt's ids.

    Args:
        prompt: a string, which is a user's turn where the model chats; chat messages; or ids.
        parts: the model's.
        raw: take a string verbatim.

    Raises:
        InvalidPrompt: it is of no kind that is known, its template refuses it, or it has no tokens
            or some that the model does not embed.
    """
    codec, info = parts.codec, parts.info
    if not isinstance(prompt, str | Sequence) or isinstance(prompt, bytes | bytearray):
        shapes = "a string, a list of chat messages or a list of token ids"
        raise InvalidPrompt(f"the prompt is {type(prompt).__name__} but must be {shapes}")
    if len(prompt) == 0:
        raise InvalidPrompt("the prompt is empty")
    if isinstance(prompt, str):
        is_turn = codec.chats and not raw
        turn = {"role": "user", "content": prompt}
        tokens = _encoded(codec.render([turn]) if is_turn else prompt, codec)
    elif isinstance(prompt[0], Mapping):
        tokens = _encoded(_rendered(_messages(prompt), codec), codec)
    else:
        tokens = _ids(prompt, info)
    if not tokens:
        raise InvalidPrompt("the prompt has no tokens")
    if max(tokens) >= info.num_tokens:
        raise InvalidPrompt(
            f"the prompt's text holds the token {codec.decode([max(tokens)]) or max(tokens)!r} of "
            f"the tokenizer, which model {info.name} does not embed: its ids go from 0 to "
            f"{info.num_tokens - 1}"
        )
    return tokens


def _encoded(text: str, codec: TextCodec) -> list[int]:
    if not is_encodable(text):  # a tokenizer would raise something of its own
        raise InvalidPrompt(
            "the prompt holds half of a surrogate pair, which is no character; decode it with "
            "errors='replace', or leave it out"
        )
    return codec.encode(text)


def _rendered(messages: Sequence[Mapping[str, str]], codec: TextCodec) -> str:
    """Return the prompt of a conversation; a last message of the assistant's is to be continued."""
    *before, last = messages
    if before and last["role"] == "assistant":
        return codec.render(before) + last["content"]
    text = codec.render(messages)
    for number, message in enumerate(messages):
        role = message["role"]
        if role not in ROLES and message["content"].strip() not in text:
            raise InvalidPrompt(
                f"the model's chat template leaves chat message {number} out: it does not know "
                f"the role {role!r:.80}; take one of {', '.join(ROLES)}"
            )
    return text


def _messages(prompt: Sequence[object]) -> list[Mapping[str, str]]:
    messages: list[Mapping[str, str]] = []
    for number, message in enumerate(prompt):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise InvalidPrompt(
                f"chat message {number} is {shown(message)}; it needs role and content"
            )
        for field in ("role", "content"):
            if not isinstance(message[field], str):
                raise InvalidPrompt(
                    f"the {field} of chat message {number} is {shown(message[field])}, no string"
                )
        messages.append(message)
    return messages


def _ids(prompt: Sequence[object], info: ModelInfo) -> list[int]:
    ids = [token for token in prompt if type(token) is int]
    if len(ids) == len(prompt) and min(ids) >= 0 and max(ids) < info.num_tokens:
        return ids  # a tenth of the time of what follows, on the event loop
    ids = []
    for number, token in enumerate(prompt):
        try:
            if isinstance(token, bool):
                raise TypeError
            ids.append(operator.index(token))  # type: ignore[arg-type]
        except TypeError:
            raise InvalidPrompt(
                f"prompt token {number} is {shown(token)}, not an integer"
            ) from None
        if not 0 <= ids[-1] < info.num_tokens:
            raise InvalidPrompt(
                f"prompt token {number} is {shown(ids[-1])} but the ids of model {info.name} "
                f"go from 0 to {info.num_tokens - 1}"
            )
    return ids
