"""Verified answers: the decoder against plain AR, wherever it drafts."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_runtime.decoding.decoder import Committed
from d2f_runtime.decoding.draft_decoder import MAX_BRANCHES, DraftDecoder
from d2f_runtime.decoding.draft_plan import DraftPlan
from d2f_runtime.decoding.verification import check_verifiable
from d2f_runtime.decoding.width import MAX_DRAFTS, OWN, Width, widths_of
from d2f_runtime.decoding.window import NO_TOKEN, Proposals, Window
from d2f_stream.core.errors import InvalidParams
from d2f_stream.core.params import GenerationParams, ParamOverrides
from verified_loop import MASK, next_token_loop

LEVELS = 16
CAUSAL: Final[dict[str, Any]] = {
    "shift_logits": True,
    "prompt_attention": "causal",
    "commit_attention": "causal",
}


@dataclass(frozen=True)
class Twins:
    """An autoregressive oracle, and draft rows that guess its answer, rightly or not."""

    seed: int
    eos_share: int  # per cent of the next tokens
    skill: int  # per cent of the drafts that are right after a right prefix
    num_tokens: int
    prompt: tuple[int, ...]
    eos_ids: tuple[int, ...]

    def bits(self, *state: object) -> int:
        return (hash((self.seed, *state)) * 0x9E3779B97F4A7C15) % 2**64 >> 8

    def next_token(self, prefix: tuple[int, ...]) -> int:
        assert MASK not in prefix, "a clean row saw a mask"
        bits = self.bits(prefix)
        if bits % 100 < self.eos_share:
            return self.eos_ids[bits // 100 % len(self.eos_ids)]
        return 10 + bits // 1000 % self.num_tokens

    def draft(self, visible: tuple[int, ...], position: int) -> tuple[int, float]:
        bits = self.bits(visible, position)
        token = 10 + bits // 1000 % self.num_tokens
        if bits % 100 < self.skill:
            token = self.after(position)
        return token, bits // 10**6 % (LEVELS + 1) / LEVELS

    def after(self, position: int) -> int:
        """What stands at a canvas position of the true answer, were it not to end."""
        tokens = list(self.prompt)
        while len(tokens) <= position:
            tokens.append(self.next_token(tuple(tokens)))
        return tokens[position]


@dataclass(frozen=True)
class Verified:
    twins: Twins
    params: GenerationParams
    spare_rows: int
    branches: bool

    def decoder(self) -> DraftDecoder:
        return DraftDecoder(
            prompt_tokens=self.twins.prompt,
            params=self.params,
            mask_id=MASK,
            eos_ids=self.twins.eos_ids,
            spare_rows=self.spare_rows,
            branches=self.branches,
        )

    def expected(self) -> list[int]:
        twins = self.twins
        return next_token_loop(
            twins.prompt, twins.next_token, self.params.max_new_tokens, twins.eos_ids
        )


@st.composite
def verified_cases(draw: st.DrawFn) -> Verified:
    share = st.integers(1, LEVELS).map(lambda level: level / LEVELS)
    twins = Twins(
        seed=draw(st.integers(0, 2**32)),
        eos_share=draw(st.sampled_from((0, 0, 1, 5, 20))),
        skill=draw(st.sampled_from((0, 30, 70, 95, 100))),
        num_tokens=draw(st.integers(1, 4)),
        prompt=tuple(draw(st.lists(st.integers(10, 13), min_size=1, max_size=8))),
        eos_ids=draw(st.sampled_from(((1,), (1, 2)))),
    )
    params = GenerationParams(
        commit="verify",
        max_new_tokens=draw(st.integers(1, 70)),
        block_size=draw(st.sampled_from((1, 2, 3, 4, 7, 8, 16, 32))),
        confidence_threshold=draw(share),
        max_active_blocks=draw(st.sampled_from((1, 2, 4, None))),
        tail=draw(st.sampled_from(("cut", "whole"))),
    )
    spare_rows = draw(st.sampled_from((1, 4, 10, 100, 10_000)))
    return Verified(twins, params, spare_rows, draw(st.booleans()))


def proposals_of(twins: Twins, cache: list[int], window: Window) -> Proposals:
    """Answer like a backend: clean rows as the AR model, the others as drafts."""
    canvas = (*cache, *window.tokens)
    tokens, confidence = [NO_TOKEN] * window.num_entries, [0.0] * window.num_entries
    visible = window.visible_until()
    asked = [at for at in window.asked(MASK) if at < len(window.tokens)]
    for at in asked:
        position = window.start + at
        if at <= window.num_to_cache:  # predicted by a row that is clean
            assert at == 0 or visible[at - 1] == position, "a clean row sees beyond itself"
            tokens[at], confidence[at] = twins.next_token(canvas[:position]), 0.5
        else:
            seen = canvas[: visible[at - 1]]
            tokens[at], confidence[at] = twins.draft(seen, position)
    entry = len(window.tokens)
    for branch in window.branches:
        seen = (*canvas[: branch.start], *[MASK] * branch.num_masks)
        for position in range(branch.start, branch.start + branch.num_masks):
            tokens[entry], confidence[entry] = twins.draft(seen, position + 1)
            entry += 1
    assert [*asked, *range(len(window.tokens), entry)] == window.asked(MASK)
    return Proposals(tokens, confidence)


def run(
    case: Verified, widths: Sequence[Width] = (OWN,)
) -> tuple[list[int], list[Window], list[Committed]]:
    """Decode to the end, a width after the other, checking what must hold at every step."""
    decoder, size = case.decoder(), case.params.block_size
    cache: list[int] = []
    windows: list[Window] = []
    commits: list[Committed] = []
    num_prompt, wanted = len(case.twins.prompt), case.expected()
    end = num_prompt + case.params.max_new_tokens
    turns = itertools.cycle(widths)
    while (window := decoder.next_window(width := next(turns))) is not None:
        assert window.start <= len(cache)
        del cache[window.start :]
        clean = window.start + window.num_to_cache
        masks = [position for position, token in enumerate(window.tokens) if token == MASK]
        assert masks == [*range(window.num_to_cache, len(window.tokens))]
        stops = {*range(window.start + 1, clean + 1), window.stop - 1, window.stop}
        assert window.block_stops == tuple(stop for stop in sorted(stops) if stop > window.start)
        assert window.stop <= end
        assert 0 not in window.asked(MASK) or window.start == 0, "its row is no longer kept"
        assert len(window.branches) <= (MAX_BRANCHES if case.branches else 0)
        for branch in window.branches:
            assert window.start < branch.start < clean
            assert branch.num_masks >= 1
            assert branch.start + branch.num_masks < end
        num_masks = max(0, len(masks) - 1) + window.num_branch_masks  # the last one does not run
        assert num_masks <= MAX_DRAFTS
        assert width.max_drafts is None or num_masks < width.max_drafts
        assert num_masks <= size * (case.params.max_active_blocks or MAX_DRAFTS)
        before = len(decoder.answer_tokens) - window.num_to_verify
        events = decoder.apply(proposals_of(case.twins, cache, window))
        assert decoder.num_cached <= clean
        verified = decoder.answer_tokens[: decoder.num_cached - num_prompt + 1]
        assert [*verified] == wanted[: len(verified)]
        assert len(verified) > before, "no step brings less than a token"
        cache = [*cache, *window.tokens[: window.num_to_cache]]
        assert list(decoder.cached_tokens) == cache[: decoder.num_cached]
        commits += [event for event in events if isinstance(event, Committed)]
        windows.append(window)
    answer = [token for commit in commits for token in commit.tokens]
    for index, commit in enumerate(commits):
        assert commit.index == index
        assert commit.start == index * size
        assert commit.stop == min(commit.start + size, len(answer))
    assert decoder.finish_reason == ("eos" if answer[-1] in case.twins.eos_ids else "length")
    assert decoder.num_useful_tokens == len(answer)
    return answer, windows, commits


@given(verified_cases())
@settings(max_examples=300)
def test_a_verified_answer_is_the_autoregressive_one(case: Verified) -> None:
    answer, windows, _ = run(case)
    assert answer == case.expected()
    assert len(windows) <= len(answer)


def lone(skill: int, **changes: object) -> tuple[int, int]:
    """Return tokens and steps of an answer that many drafts go into."""
    twins = Twins(7, eos_share=0, skill=skill, num_tokens=4, prompt=(10, 11), eos_ids=(1,))
    params = GenerationParams(
        commit="verify", max_new_tokens=400, block_size=8, confidence_threshold=0.01,
        max_active_blocks=None,
    )  # fmt: skip
    values: dict[str, object] = {"spare_rows": 10_000, "branches": True} | changes
    answer, windows, _ = run(Verified(twins, params, **values))  # type: ignore[arg-type]
    return len(answer), len(windows)


@given(verified_cases(), st.lists(st.integers(0, 40), min_size=1, max_size=12))
@settings(max_examples=150)
def test_an_answer_does_not_depend_on_how_wide_its_windows_are(
    case: Verified, turns: list[int]
) -> None:
    widths = widths_of(case.params, case.params.block_size)
    answer, windows, _ = run(case, [widths[turn % len(widths)] for turn in turns])
    assert answer == case.expected()
    assert len(windows) <= len(answer)


@given(verified_cases())
@settings(max_examples=50)
def test_the_narrowest_windows_are_autoregressive_steps(case: Verified) -> None:
    answer, windows, _ = run(case, [Width(max_drafts=1)])
    assert len(windows) == len(answer)
    assert {window.num_to_cache for window in windows[1:]} <= {1}
    for window in windows:  # nothing runs, and nothing is asked, for the sake of drafts
        assert window.num_forwarded(MASK, shift_logits=True) == window.num_to_cache
        assert len(window.asked(MASK)) == 1
        assert not window.branches
        assert not window.num_to_verify


def test_right_drafts_take_fewer_steps_than_tokens() -> None:
    assert lone(100, branches=False)[1] < 400 / 4
    assert lone(100)[1] < 400 / 4


def test_branches_save_the_steps_that_only_draft() -> None:
    tokens, without = lone(75, branches=False, spare_rows=10)
    _, behind_all = lone(75, branches=False)
    _, within = lone(75)
    assert tokens == 400
    assert within < 0.75 * without
    assert within < behind_all


@given(
    confidence=st.lists(st.floats(0, 1), max_size=16),
    size=st.integers(1, 16),
    spare=st.integers(1, 1000),
    most=st.integers(0, 64),
)
def test_plans_take_likelier_places_first_and_stay_in_bounds(
    confidence: list[float], size: int, spare: int, most: int
) -> None:
    behind, places = DraftPlan(size, spare, MAX_BRANCHES).behind(confidence, most)
    assert list(places) == sorted(set(places))
    assert all(0 <= place < len(confidence) for place in places)
    assert 0 <= behind <= size
    assert behind + size * len(places) <= most
    more = DraftPlan(size, spare * 2, MAX_BRANCHES).behind(confidence, most)
    assert len(more[1]) + (more[0] > 0) >= len(places) + (behind > 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sub_block_size": 2}, "sub_block_size"),
        ({"stop_at_eos": "drain"}, "stop_at_eos"),
        ({"attention": "full"}, "attention"),
        ({"edit_threshold": 0.5}, "edit_threshold"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: ParamOverrides, message: str) -> None:
    params = GenerationParams(commit="verify").with_overrides(changes)
    with pytest.raises(InvalidParams, match=message):
        check_verifiable(params, **CAUSAL)


@pytest.mark.parametrize(
    "changes",
    [
        {"shift_logits": False},
        {"prompt_attention": "full"},
        {"prompt_attention": "grid", "commit_attention": "block"},
        {"commit_attention": "block"},
    ],
)
def test_models_that_predict_no_next_token_are_refused(changes: dict[str, object]) -> None:
    params = GenerationParams(commit="verify", block_size=4)
    with pytest.raises(InvalidParams, match="commit"):
        check_verifiable(params, **(CAUSAL | changes))
