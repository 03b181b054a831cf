import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2f_runtime.engine.fill_laws import BlocksLaw, DraftsLaw, FillLaw

SPEEDS = st.floats(0.05, 12.0)
DRAFTS = [DraftsLaw(drafts) for drafts in (2, 4, 8, 32)]
BLOCKS = [
    *(BlocksLaw(1, size) for size in (8, 16, 32)),
    *(BlocksLaw(blocks, 32) for blocks in (2, 3, 4)),
]


@pytest.mark.parametrize("law", [*DRAFTS, *BLOCKS])
@given(speed=SPEEDS)
def test_the_speed_follows_from_the_tokens_that_it_brings(law: FillLaw, speed: float) -> None:
    speed = min(speed, law.speed(8.0))  # no block of 8 fills in less than a step
    assert law.speed(law.tokens(speed)) == pytest.approx(speed)


@pytest.mark.parametrize("laws", [DRAFTS, BLOCKS])
@given(speed=SPEEDS)
def test_wider_windows_bring_no_less_and_need_more_rows(laws: list[FillLaw], speed: float) -> None:
    tokens = [law.tokens(speed) for law in laws]
    rows = [law.rows for law in laws]
    assert tokens == sorted(tokens)
    assert rows == sorted(set(rows))


@given(tokens=st.floats(1.0, 64.0))
def test_a_single_token_tells_nothing_of_wider_windows(tokens: float) -> None:
    for law in (DraftsLaw(1), BlocksLaw(1, 1)):
        assert law.tokens(3.0) == law.rows == 1.0
        assert law.speed(tokens) == law.usual


def test_simulated_steps_are_met() -> None:
    """Blocks of 16, of which 8 tokens bring 3.9 a step, one block 5.3, two 8.6 and four 9.9."""
    speed = BlocksLaw(1, 8).speed(3.88)
    found = [BlocksLaw(blocks, 16).tokens(speed) for blocks in (1, 2, 4)]
    assert found == pytest.approx([5.3, 8.6, 9.9], rel=0.1)
