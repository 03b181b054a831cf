"""Conversations: what their turns have in common, and which replica is home to one. Pure.

A replica that answered a conversation's earlier turns need not compute them again. No server keeps
where that was: each finds the same home from the conversation's key and the names of the replicas
there are (rendezvous hashing). One that comes or goes moves no conversation but those that it gets
or had.
"""

from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Final

import msgspec

from d2f_stream.core.session import Prompt

__all__ = ["IN_DOUBT", "ReadPrompt", "beginning_of", "home_of", "key_of"]

IN_DOUBT: Final = "?"
"""Instead of a key: goes to a replica that answers now, since one may be gone without a word."""
MAX_LOAD: Final = 1.25
"""Of a home, in parts of the mean, so that company makes no step much longer than elsewhere."""
MAX_MORE: Final = 1
"""Calls beyond that: where next to nothing runs, another one hardly counts."""


class ReadPrompt(list[int]):
    """A prompt's ids, which still know how its conversation began.

    Attributes:
        beginning: see `beginning_of`.
    """

    __slots__ = ("beginning",)

    def __init__(self, ids: Iterable[int], beginning: str) -> None:
        super().__init__(ids)
        self.beginning = beginning


def beginning_of(prompt: Prompt, *, raw: bool) -> str:
    """Return a digest of what all turns of a conversation begin with: up to its first question.

    "" where a prompt is no turn: a string taken verbatim, ids, messages without a user's.
    """
    if isinstance(prompt, ReadPrompt):
        return prompt.beginning
    if isinstance(prompt, str):
        return "" if raw else _digest([[("content", prompt), ("role", "user")]])
    turns: list[list[tuple[str, str]]] = []
    for message in prompt:
        if isinstance(message, int):
            return ""
        turns.append(sorted(message.items()))
        if message.get("role") == "user":
            return _digest(turns)
    return ""


def key_of(beginning: str, *, scope: str) -> str:
    """Return a conversation's key, which tells nothing of it; "" where there is none.

    Args:
        beginning: of its prompts.
        scope: whose it is: replicas reuse nothing of one asker for another.
    """
    return _digest((scope, beginning)) if beginning else ""


def home_of(key: str, loads: Mapping[str, int]) -> str | None:
    """Return the replica that a conversation belongs to; None where that has too much to do.

    Args:
        key: of the conversation.
        loads: calls that each replica works on, by its name; at least one.
    """
    home = max(loads, key=lambda name: _digest((key, name)))
    mean = sum(loads.values()) / len(loads)
    return home if loads[home] <= MAX_LOAD * mean + MAX_MORE else None


def _digest(value: object) -> str:
    return blake2b(msgspec.msgpack.encode(value), digest_size=16).hexdigest()
