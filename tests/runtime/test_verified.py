"""Verified commits: the decoder step by step against a naive loop, its answer against plain AR."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_runtime.decoding.decoder import BlockDecoder, Committed
from d2f_runtime.decoding.width import OWN, Width, widths_of
from d2f_runtime.decoding.window import NO_TOKEN, Proposals, Window
from d2f_stream.core.errors import InvalidParams
from d2f_stream.core.params import GenerationParams, ParamOverrides
from verified_loop import MASK, VerifiedSettings, VerifiedStep, next_token_loop, verified_loop

LEVELS = 16


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

    def decoder(self) -> BlockDecoder:
        return BlockDecoder(
            prompt_tokens=self.twins.prompt,
            params=self.params,
            mask_id=MASK,
            eos_ids=self.twins.eos_ids,
            shift_logits=True,
            prompt_attention="causal",
            commit_attention="causal",
        )

    def settings(self) -> VerifiedSettings:
        return VerifiedSettings(
            block_size=self.params.block_size,
            max_new_tokens=self.params.max_new_tokens,
            add_threshold=self.params.add_threshold,
            confidence_threshold=self.params.confidence_threshold,
            max_active_blocks=self.params.max_active_blocks,
            eos_ids=self.twins.eos_ids,
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
        add_threshold=draw(share),
        activate_threshold=draw(share),
        confidence_threshold=draw(share),
        max_active_blocks=draw(st.sampled_from((1, 2, 3, 4, None))),
    )
    return Verified(twins, params)


def proposals_of(twins: Twins, cache: list[int], window: Window) -> Proposals:
    """Answer like a backend: clean rows as the AR model, the others as drafts."""
    canvas = (*cache, *window.tokens)
    tokens, confidence = [NO_TOKEN] * len(window.tokens), [0.0] * len(window.tokens)
    visible = window.visible_until()
    for at in window.asked(MASK):
        position = window.start + at
        if at <= window.num_to_cache:  # predicted by a row that is clean
            assert at == 0 or visible[at - 1] == position, "a clean row sees beyond itself"
            tokens[at], confidence[at] = twins.next_token(canvas[:position]), 0.5
        else:
            tokens[at], confidence[at] = twins.draft(canvas[: visible[at]], position)
    return Proposals(tokens, confidence)


def run(
    case: Verified, widths: Sequence[Width] = (OWN,)
) -> tuple[list[int], list[VerifiedStep], list[Committed]]:
    """Decode to the end, a width after the other, checking what must hold at every step."""
    decoder, size = case.decoder(), case.params.block_size
    cache: list[int] = []
    steps: list[VerifiedStep] = []
    commits: list[Committed] = []
    num_prompt, wanted = len(case.twins.prompt), case.expected()
    turns = itertools.cycle(widths)
    while (window := decoder.next_window(width := next(turns))) is not None:
        assert window.start <= len(cache)
        num_drafts = window.tokens[window.num_to_cache :].count(MASK)
        assert width.max_drafts is None or num_drafts <= width.max_drafts
        del cache[window.start :]
        assert window.block_stops[-1] == window.stop
        assert window.stop <= num_prompt + case.params.max_new_tokens
        clean = window.start + window.num_to_cache
        edges = {*range(num_prompt, window.stop, size), window.stop}
        stops = sorted({*range(window.start + 1, clean + 1), *(e for e in edges if e > clean)})
        assert list(window.block_stops) == stops
        asked = window.asked(MASK)
        assert window.start == 0 or 0 not in asked, "its predicting row is no longer kept"
        events = decoder.apply(proposals_of(case.twins, cache, window))
        assert decoder.num_cached <= clean
        cache = [*cache, *window.tokens[: window.num_to_cache]]
        assert (
            cache[num_prompt : decoder.num_cached]
            == [*wanted, *cache[num_prompt + len(wanted) :]][
                : max(0, decoder.num_cached - num_prompt)
            ]
        ), "only what is verified stays cached"
        commits += [event for event in events if isinstance(event, Committed)]
        steps.append(VerifiedStep(window.start, list(window.tokens), window.num_to_cache, -1))
    answer = [token for commit in commits for token in commit.tokens]
    for index, commit in enumerate(commits):
        assert commit.index == index
        assert commit.start == index * size
        assert commit.stop == min(commit.start + size, len(answer))
    assert decoder.finish_reason == ("eos" if answer[-1] in case.twins.eos_ids else "length")
    return answer, steps, commits


@given(verified_cases())
@settings(max_examples=150, deadline=None)
def test_a_verified_answer_is_the_autoregressive_one(case: Verified) -> None:
    answer, steps, _ = run(case)
    assert answer == case.expected()
    assert len(steps) <= len(answer), "no step brings less than a token"


@given(verified_cases())
@settings(max_examples=150, deadline=None)
def test_verified_decoding_takes_the_naive_loop_step_by_step(case: Verified) -> None:
    twins = case.twins
    expected, wanted = verified_loop(twins.prompt, twins.next_token, twins.draft, case.settings())
    answer, steps, _ = run(case)
    assert answer == expected
    found = [(step.start, step.tokens, step.num_clean) for step in steps]
    assert found == [(step.start, step.tokens, step.num_clean) for step in wanted]


@given(verified_cases(), st.lists(st.integers(0, 40), min_size=1, max_size=12))
@settings(max_examples=150, deadline=None)
def test_an_answer_does_not_depend_on_how_wide_its_windows_are(
    case: Verified, turns: list[int]
) -> None:
    widths = widths_of(case.params, case.params.block_size)
    answer, steps, _ = run(case, [widths[turn % len(widths)] for turn in turns])
    assert answer == case.expected()
    assert len(steps) <= len(answer)


@given(verified_cases())
@settings(max_examples=50, deadline=None)
def test_the_narrowest_windows_are_autoregressive_steps(case: Verified) -> None:
    answer, steps, _ = run(case, widths_of(case.params, case.params.block_size)[:1])
    assert len(steps) == len(answer)
    assert {step.num_clean for step in steps[1:]} <= {1}


def test_right_drafts_take_fewer_steps_than_tokens() -> None:
    twins = Twins(7, eos_share=0, skill=100, num_tokens=4, prompt=(10, 11), eos_ids=(1,))
    params = GenerationParams(
        commit="verify",
        max_new_tokens=64,
        block_size=8,
        confidence_threshold=0.2,
        add_threshold=0.1,
    )
    answer, steps, _ = run(Verified(twins, params))
    assert len(answer) == 64
    assert len(steps) < 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sub_block_size": 2}, "sub_block_size"),
        ({"stop_at_eos": "drain"}, "stop_at_eos"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: ParamOverrides, message: str) -> None:
    params = GenerationParams(commit="verify").with_overrides(changes)
    with pytest.raises(InvalidParams, match=message):
        Verified(Twins(0, 0, 0, 1, (10,), (1,)), params).decoder()


@pytest.mark.parametrize(
    ("shifted", "prompt", "commit", "block_size"),
    [
        (False, "causal", "causal", 4),
        (True, "full", "causal", 4),
        (True, "grid", "block", 4),
        (True, "causal", "block", 4),
    ],
)
def test_models_that_predict_no_next_token_are_refused(
    shifted: bool, prompt: str, commit: str, block_size: int
) -> None:
    with pytest.raises(InvalidParams, match="commit"):
        BlockDecoder(
            prompt_tokens=(10,),
            params=GenerationParams(commit="verify", block_size=block_size),
            mask_id=MASK,
            eos_ids=(1,),
            shift_logits=shifted,
            prompt_attention=prompt,  # type: ignore[arg-type]
            commit_attention=commit,  # type: ignore[arg-type]
            native_block_size=block_size,
        )
