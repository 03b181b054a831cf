import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2f_runtime.decoding.width import OWN, Width, widths_of
from d2f_runtime.engine.request_kind import RequestKind
from d2f_runtime.engine.width_gains import Gain, Span, WidthGains
from d2f_stream.core.params import GenerationParams
from d2f_stream.core.presets import PRESETS

ONE_BLOCK = PRESETS["verified"].with_overrides({"max_active_blocks": 1})


def verified() -> WidthGains:
    return RequestKind.of(ONE_BLOCK, 8).gains()


def test_widths_of_a_verified_answer_are_numbers_of_drafts() -> None:
    drafts = [Width(max_drafts=count) for count in (1, 2, 4)]
    assert widths_of(ONE_BLOCK, 8) == (*drafts, OWN)
    assert len(widths_of(PRESETS["verified"], 8)) == 7  # 32 drafts stand before its 64


def test_widths_of_a_pipeline_are_numbers_of_blocks() -> None:
    assert widths_of(GenerationParams(max_active_blocks=3), 32) == (
        Width(max_active_blocks=1),
        Width(max_active_blocks=2),
        OWN,
    )


@pytest.mark.parametrize("name", ["autoregressive", "single-block", "llada-vanilla", "sdar"])
def test_what_cannot_be_narrower_has_one_width(name: str) -> None:
    assert widths_of(PRESETS[name], 8) == (OWN,)


def test_a_single_draft_is_known_to_bring_one_token_for_one_row() -> None:
    gains = verified()
    assert gains.known(0)
    assert gains.expected[0] == Gain(1.0, 1.0)


def test_gains_approach_what_was_seen() -> None:
    gains = verified()
    for _ in range(50):
        gains.note(2, Span(steps=4, tokens=8, rows=24))
    assert gains.expected[2].tokens == pytest.approx(2.0, rel=0.05)
    assert gains.expected[2].rows == pytest.approx(6.0, rel=0.05)


def test_a_width_that_was_not_used_for_long_is_unknown_again() -> None:
    gains = verified()
    for _ in range(6):
        gains.note(1, Span(4, 6, 16))
    assert gains.tried(1)
    for _ in range(1000):
        gains.note(3, Span(4, 8, 40))
    assert not gains.known(1)
    assert gains.hoped[1].tokens > gains.expected[1].tokens


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 8)), max_size=60))
def test_hopes_are_no_less_than_what_is_expected(spans: list[tuple[int, int, int]]) -> None:
    gains = verified()
    for index, steps, tokens in spans:
        gains.note(index, Span(steps, tokens, 5 * steps))
    for hoped, expected in zip(gains.hoped, gains.expected, strict=True):
        assert hoped.tokens >= expected.tokens > 0
        assert hoped.rows == expected.rows > 0
