"""Windows that pay, in simulations of real decoders under curves that were measured."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.scheduling.comparison import WORKLOADS, compare
from lab.scheduling.curves import CURVES, StepCurve


@pytest.mark.parametrize(
    ("curve", "workload", "load"),
    [("h200-bf16", "drafts", 1), ("h200-fp8", "drafts", 8), ("h200-bf16", "d2f-10", 4)],
)
def test_what_pays_is_hardly_below_the_best_fixed_windows(
    curve: str, workload: str, load: int
) -> None:
    (row,) = compare(WORKLOADS[workload], CURVES[curve], loads=[load])
    assert row["pays_to_best_fixed"] > 0.93  # learning, from nothing, included
    if workload == "drafts":
        assert row["pays_to_one_token"] > 0.95


def test_a_client_alone_has_the_windows_of_its_requests() -> None:
    (row,) = compare(WORKLOADS["d2f-10"], CURVES["h200-bf16"], loads=[1])
    assert row["pays"]["tokens_per_step"] == row["fixed"]["own"]["tokens_per_step"]


@settings(max_examples=4, deadline=None)
@given(
    fixed=st.floats(0.5, 10.0),
    row=st.floats(0.001, 1.0),
    session=st.floats(0.0, 0.5),
    load=st.sampled_from([2, 6]),
)
def test_no_affine_device_makes_verified_windows_slower_than_single_tokens(
    fixed: float, row: float, session: float, load: int
) -> None:
    curve = StepCurve(((1, fixed + row), (2048, fixed + 2048 * row)), session, "made up")
    (found,) = compare(WORKLOADS["drafts"], curve, loads=[load])
    assert found["pays_to_one_token"] > 0.95
    assert found["pays_to_best_fixed"] > 0.9
