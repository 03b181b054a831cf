"""The joint threshold, against its definition over all subsets and inside the decoder."""

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from d2f_runtime.decoding.adaptive import JointThresholdPolicy
from d2f_runtime.decoding.policy import ThresholdPolicy, policy_of
from d2f_stream.core.params import GenerationParams

# exact in binary, so that sums do not depend on their order
CONFIDENCE = st.integers(0, 256).map(lambda n: n / 256)
BLOCK = st.lists(CONFIDENCE, min_size=1, max_size=8)
THRESHOLD = st.integers(128, 256).map(lambda n: n / 256)


def accepted(
    confidence: list[float], threshold: float, *, fully_activated: bool = False
) -> list[int]:
    policy = JointThresholdPolicy(threshold)
    masked = range(len(confidence))
    return [*policy.accept(masked, confidence, confidence, fully_activated=fully_activated)]


@given(confidence=BLOCK, threshold=THRESHOLD)
def test_no_larger_set_is_jointly_above_the_threshold(
    confidence: list[float], threshold: float
) -> None:
    taken = accepted(confidence, threshold)
    allowed = [
        chosen
        for size in range(len(confidence) + 1)
        for chosen in combinations(range(len(confidence)), size)
        if not chosen or 1 - sum(1 - confidence[offset] for offset in chosen) > threshold
    ]
    assert tuple(taken) in allowed
    assert len(taken) == max(map(len, allowed))


@given(confidence=BLOCK, threshold=THRESHOLD)
def test_nothing_passes_that_the_threshold_on_each_token_would_refuse(
    confidence: list[float], threshold: float
) -> None:
    each = ThresholdPolicy(threshold).accept(
        range(len(confidence)), confidence, confidence, fully_activated=False
    )
    assert set(accepted(confidence, threshold)) <= set(each)


@given(confidence=CONFIDENCE, threshold=THRESHOLD)
def test_a_single_proposal_is_judged_as_by_the_threshold(
    confidence: float, threshold: float
) -> None:
    assert bool(accepted([confidence], threshold)) == (confidence > threshold)


def test_doubts_add_up_whatever_the_size_of_the_block() -> None:
    assert accepted([0.98] * 4, 0.9) == [0, 1, 2, 3]
    assert len(accepted([0.98] * 16, 0.9)) == 4  # a fifth would bring the doubt to 0.1
    assert accepted([1.0] * 15 + [0.92], 0.9) == [*range(16)]


def test_the_surest_come_first_and_the_leftmost_of_equals() -> None:
    assert accepted([0.95, 0.96, 0.5, 0.95], 0.9) == [0, 1]


def test_a_fully_activated_block_takes_its_best_by_rank() -> None:
    policy = JointThresholdPolicy(0.9)
    assert policy.accept([1, 2], [0, 0.3, 0.2], [0, 0.1, 0.4], fully_activated=True) == [2]
    assert accepted([0.3, 0.2], 0.9) == []


def test_a_request_asks_for_it_by_name() -> None:
    params = GenerationParams(acceptance="joint", confidence_threshold=0.8)
    assert policy_of(params) == JointThresholdPolicy(0.8)
    assert policy_of(params.with_overrides({"acceptance": "token"})) == ThresholdPolicy(0.8)
