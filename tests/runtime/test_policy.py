import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2f_runtime.decoding.policy import AcceptancePolicy, FixedCountPolicy, ThresholdPolicy

scores = st.integers(0, 4).map(lambda level: level / 4)


def test_threshold_is_strict() -> None:
    policy = ThresholdPolicy(0.9)
    accepted = policy.accept([0, 1, 2], [0.9, 0.91, 1.0], [0.0] * 3, fully_activated=False)
    assert list(accepted) == [1, 2]


def test_semi_activated_block_may_accept_nothing() -> None:
    policy = ThresholdPolicy(0.9)
    assert not policy.accept([0, 1], [0.5, 0.6], [0.5, 0.6], fully_activated=False)


def test_fully_activated_block_forces_best_proposal() -> None:
    policy = ThresholdPolicy(0.9)
    assert list(policy.accept([0, 1], [0.5, 0.6], [0.5, 0.6], fully_activated=True)) == [1]


def test_rank_picks_the_forced_proposal_and_nothing_else() -> None:
    policy = ThresholdPolicy(0.9)
    rank = [-0.1, -0.9, -0.5]
    assert list(policy.accept([0, 1, 2], [0.1, 0.8, 0.7], rank, fully_activated=True)) == [0]
    assert list(policy.accept([0, 1, 2], [0.1, 0.95, 0.7], rank, fully_activated=True)) == [1]


def test_leftmost_of_equal_proposals_is_forced() -> None:
    policy = ThresholdPolicy(1.0)
    assert list(
        policy.accept([1, 2, 3], [0.0, 0.5, 1.0, 1.0], [0, 5, 7, 7], fully_activated=True)
    ) == [2]


def test_filled_positions_are_never_accepted() -> None:
    policy = ThresholdPolicy(0.5)
    assert list(policy.accept([2], [1.0, 1.0, 0.6], [9, 9, 0], fully_activated=True)) == [2]


def test_fixed_count_takes_the_best_by_rank() -> None:
    policy = FixedCountPolicy(2)
    rank = [0.1, 0.9, 0.4, 0.9]
    assert list(policy.accept([0, 1, 2, 3], rank, rank, fully_activated=True)) == [1, 3]
    assert list(policy.accept([0, 2, 3], rank, rank, fully_activated=False)) == [2, 3]


def test_fixed_count_takes_the_leftmost_of_equals_and_what_is_left() -> None:
    assert list(
        FixedCountPolicy(2).accept([1, 4, 6], [0.5] * 7, [0.5] * 7, fully_activated=True)
    ) == [1, 4]
    assert list(FixedCountPolicy(9).accept([1, 4], [0.5] * 7, [0.5] * 7, fully_activated=True)) == [
        1,
        4,
    ]


@pytest.mark.parametrize("policy", [ThresholdPolicy(0.5), FixedCountPolicy(1), FixedCountPolicy(3)])
@given(
    confidence=st.lists(scores, min_size=8, max_size=8),
    rank=st.lists(scores, min_size=8, max_size=8),
    masked=st.sets(st.integers(0, 7), min_size=1).map(sorted),
)
def test_fully_activated_block_always_progresses(
    policy: AcceptancePolicy, confidence: list[float], rank: list[float], masked: list[int]
) -> None:
    accepted = list(policy.accept(masked, confidence, rank, fully_activated=True))
    assert accepted
    assert accepted == sorted(set(accepted))
    assert set(accepted) <= set(masked)
