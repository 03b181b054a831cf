"""PrefixCache: which stored K/V a new prompt can begin with. Pure: tokens and slots, no tensors.

What stored K/V may stand for depends on who sees whom (`ModelInfo.prompt_attention`):

- causal: K/V of a position depend on the tokens up to it, so any common beginning can be reused;
- grid: on the tokens up to the end of its block, so whole blocks of a common beginning can;
- full: a prompt's K/V depend on all of the prompt, so only the same prompt again can;
- prompt_grid: on where the prompt ends, too: the same.

Entries belong to a scope, and are found from within it only: how long a first block takes would
tell one client what another has asked.
"""

from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from d2f_runtime.models.facts import PromptAttention

__all__ = ["Match", "PrefixCache"]

SlotT = TypeVar("SlotT", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Match(Generic[SlotT]):
    """A slot whose first `num_tokens` are what a prompt begins with."""

    slot: SlotT
    num_tokens: int


@dataclass(slots=True)
class _Entry:
    scope: str
    tokens: bytes  # of what is stored, four bytes each, so that equality is one comparison
    num_prompt: int
    capacity: int  # tokens that the slot takes
    is_open: bool = field(default=True)  # its session runs, so that it must not be evicted


class PrefixCache(Generic[SlotT]):
    """Slots in order of use; those whose session has ended can be evicted.

    Args:
        attention: of prompts, see the module.
        block_size: of the grid; unused otherwise.
        max_kept: slots of ended sessions that are held at most; 0 holds none.
    """

    def __init__(self, attention: PromptAttention, block_size: int, *, max_kept: int = 64) -> None:
        self._attention = attention
        self._block_size = block_size
        self._max_kept = max_kept
        self._entries: dict[SlotT, _Entry] = {}  # least recently used first
        self.kept_tokens = 0  # storage that slots of ended sessions take
        self.num_tokens_reused = 0

    def __contains__(self, slot: SlotT) -> bool:
        return slot in self._entries

    def find(self, prompt: Sequence[int], scope: str) -> Match[SlotT] | None:
        """Return the slot that holds most of a prompt's beginning; None where none holds any.

        At least the prompt's last token is left to run: what follows is predicted from it.
        """
        wanted = _packed(prompt)
        best: Match[SlotT] | None = None
        for slot, entry in self._entries.items():
            if entry.scope != scope:
                continue
            number = self._usable(entry, wanted)
            if number and (best is None or number >= best.num_tokens):  # the latest of equals
                best = Match(slot, number)
        if best is not None:
            self._touch(best.slot)
            self.num_tokens_reused += best.num_tokens
        return best

    def opened(self, slot: SlotT, prompt: Sequence[int], scope: str, *, capacity: int) -> None:
        """Note that a running session's slot holds its whole prompt by now."""
        self._entries[slot] = _Entry(scope, _packed(prompt), len(prompt), capacity)

    def ended(self, slot: SlotT, tokens: Sequence[int]) -> list[SlotT]:
        """Note that a slot's session is over, and what is stored in it; return slots to close.

        The slot itself is among them where nothing of it is worth keeping, or another entry of its
        scope holds as much. So are those that are too many, least recently used first.
        """
        entry = self._entries.get(slot)
        if entry is None or not tokens or not self._max_kept:
            self.forget(slot)
            return [slot]
        entry.tokens, entry.is_open = _packed(tokens), False
        self.kept_tokens += entry.capacity
        self._touch(slot)
        closed = [
            other
            for other, kept in self._entries.items()
            if other != slot
            and not kept.is_open
            and kept.scope == entry.scope
            and self._serves(entry, kept)
        ]
        kept_slots = [
            s for s, kept in self._entries.items() if not kept.is_open and s not in closed
        ]
        closed += kept_slots[: max(0, len(kept_slots) - self._max_kept)]
        for other in closed:
            self.forget(other)
        return closed

    def evict(self) -> SlotT | None:
        """Give up the least recently used slot whose session is over; None where there is none."""
        for slot, entry in self._entries.items():
            if not entry.is_open:
                self.forget(slot)
                return slot
        return None

    def forget(self, slot: SlotT) -> None:
        """The slot was closed otherwise. Idempotent."""
        entry = self._entries.pop(slot, None)
        if entry is not None and not entry.is_open:
            self.kept_tokens -= entry.capacity

    @property
    def num_kept(self) -> int:
        """Slots of ended sessions."""
        return sum(not entry.is_open for entry in self._entries.values())

    def _usable(self, entry: _Entry, wanted: bytes) -> int:
        if self._attention in ("full", "prompt_grid"):
            stored = entry.tokens[: 4 * entry.num_prompt]
            return entry.num_prompt if stored == wanted else 0
        number = min(_common(entry.tokens, wanted), len(wanted) // 4 - 1)
        if self._attention == "grid":
            number -= number % self._block_size
        return max(number, 0)

    def _serves(self, entry: _Entry, other: _Entry) -> bool:
        """Whether whatever could be reused of `other` can be reused of `entry`."""
        if self._attention in ("full", "prompt_grid"):
            size = 4 * other.num_prompt
            return (
                entry.num_prompt == other.num_prompt and entry.tokens[:size] == other.tokens[:size]
            )
        return entry.tokens.startswith(other.tokens)

    def _touch(self, slot: SlotT) -> None:
        self._entries[slot] = self._entries.pop(slot)


def _packed(tokens: Sequence[int]) -> bytes:
    return array("I", tokens).tobytes()


def _common(first: bytes, second: bytes) -> int:
    """Return how many tokens two texts have in common at their beginning."""
    low, high = 0, min(len(first), len(second)) // 4
    while low < high:
        middle = (low + high + 1) // 2
        if first[: 4 * middle] == second[: 4 * middle]:
            low = middle
        else:
            high = middle - 1
    return low
