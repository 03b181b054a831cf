"""What stored K/V a prompt may begin with: against a definition by every position."""

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from d2f_runtime.prefix_cache import Match, PrefixCache

Attention = Literal["full", "causal", "grid"]
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=12)
BLOCK = 4


def is_valid(stored: list[int], num_prompt: int, prompt: list[int], n: int, how: Attention) -> bool:
    """Whether the first n stored K/V are what computing the prompt anew would give."""
    if n > len(stored) or n > len(prompt):
        return False
    if how == "full":
        return stored[:num_prompt] == prompt and n == num_prompt
    # position i sees up to `seen`: itself, or the end of its block
    seen = n if how == "causal" else -(-n // BLOCK) * BLOCK
    return n < len(prompt) and stored[:n] == prompt[:n] and (how == "causal" or seen == n)


@given(TOKENS, TOKENS, TOKENS, st.sampled_from(["full", "causal", "grid"]))
def test_match_is_valid_and_the_longest(
    prompt: list[int], answer: list[int], asked: list[int], how: Attention
) -> None:
    cache: PrefixCache[int] = PrefixCache(how, BLOCK)
    cache.opened(1, prompt, "a", capacity=32)
    assert cache.ended(1, prompt + answer) == []
    found = cache.find(asked, "a")
    stored = prompt + answer
    valid = [n for n in range(1, 25) if is_valid(stored, len(prompt), asked, n, how)]
    assert found == (Match(1, max(valid)) if valid else None)


def test_another_scope_finds_nothing() -> None:
    cache: PrefixCache[int] = PrefixCache("causal", 1)
    cache.opened(1, [1, 2, 3], "alice", capacity=8)
    assert cache.find([1, 2, 3, 4], "bob") is None
    assert cache.find([1, 2, 3, 4], "alice") == Match(1, 3)


def test_running_session_serves_others_of_its_prompt() -> None:
    cache: PrefixCache[int] = PrefixCache("full", 1)
    cache.opened(1, [5, 6, 7], "a", capacity=8)
    assert cache.find([5, 6, 7], "a") == Match(1, 3)
    assert cache.find([5, 6], "a") is None
    assert cache.evict() is None


def test_next_turn_takes_the_place_of_the_one_before() -> None:
    cache: PrefixCache[int] = PrefixCache("causal", 1)
    cache.opened(1, [1, 2], "a", capacity=4)
    cache.ended(1, [1, 2, 3])
    cache.opened(2, [1, 2, 3, 4], "a", capacity=6)
    assert cache.ended(2, [1, 2, 3, 4, 5]) == [1]
    assert cache.num_kept == 1
    assert cache.kept_tokens == 6


@pytest.mark.parametrize("max_kept", [0, 2])
def test_least_recently_used_slots_go(max_kept: int) -> None:
    cache: PrefixCache[int] = PrefixCache("causal", 1, max_kept=max_kept)
    closed = []
    for slot in range(4):
        cache.opened(slot, [slot, 9], "a", capacity=4)
        closed += cache.ended(slot, [slot, 9])
        cache.find([0, 9, 9], "a")  # the first one is used again and again
    assert closed == ([0, 1, 2, 3] if max_kept == 0 else [1, 2])


class Sessions(RuleBasedStateMachine):
    """Sessions open and end in any order; every slot is closed once, or still known."""

    @initialize(how=st.sampled_from(["full", "causal", "grid"]), max_kept=st.integers(0, 3))
    def begin(self, how: Attention, max_kept: int) -> None:
        self.cache: PrefixCache[int] = PrefixCache(how, BLOCK, max_kept=max_kept)
        self.max_kept = max_kept
        self.next_slot = 0
        self.running: dict[int, list[int]] = {}
        self.kept: set[int] = set()
        self.sizes: dict[int, int] = {}

    @rule(prompt=TOKENS, scope=st.sampled_from(["a", "b"]))
    def open(self, prompt: list[int], scope: str) -> None:
        found = self.cache.find(prompt, scope)
        assert found is None or found.slot in self.running or found.slot in self.kept
        self.cache.opened(self.next_slot, prompt, scope, capacity=len(prompt))
        self.running[self.next_slot] = prompt
        self.sizes[self.next_slot] = len(prompt)
        self.next_slot += 1

    @rule(data=st.data(), answer=TOKENS)
    def end(self, data: st.DataObject, answer: list[int]) -> None:
        if self.running:
            slot = data.draw(st.sampled_from(sorted(self.running)))
            self.kept.add(slot)
            closed = self.cache.ended(slot, self.running.pop(slot) + answer)
            assert set(closed) <= self.kept
            assert len(set(closed)) == len(closed)
            self.kept -= set(closed)

    @rule()
    def evict(self) -> None:
        slot = self.cache.evict()
        assert (slot is None) == (not self.kept)
        self.kept.discard(-1 if slot is None else slot)

    @invariant()
    def bounds_hold(self) -> None:
        if hasattr(self, "cache"):
            assert self.cache.num_kept == len(self.kept) <= self.max_kept
            assert self.cache.kept_tokens == sum(self.sizes[slot] for slot in self.kept)


TestSessions = Sessions.TestCase
