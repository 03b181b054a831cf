"""Windows that pay, in simulations of real decoders under curves that were measured."""

import asyncio

import pytest

from lab.scheduling.comparison import WORKLOADS, compare
from lab.scheduling.curves import CURVES, StepCurve
from lab.scheduling.engine_loads import EngineLoads
from lab.scheduling.long_prompts import LongPrompts


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


@pytest.mark.parametrize(
    ("fixed", "row", "session", "load"),
    [(10.0, 0.001, 0.0, 2), (0.5, 1.0, 0.5, 6)],  # rows cost nothing, and all that a step costs
)
def test_no_affine_device_makes_verified_windows_slower_than_single_tokens(
    fixed: float, row: float, session: float, load: int
) -> None:
    curve = StepCurve(((1, fixed + row), (2048, fixed + 2048 * row)), session, "made up")
    (found,) = compare(WORKLOADS["drafts"], curve, loads=[load])
    assert found["pays_to_one_token"] > 0.95
    assert found["pays_to_best_fixed"] > 0.9


@pytest.mark.usefixtures("one_core")
def test_engine_is_measured_beside_a_long_prompt() -> None:
    bench = LongPrompts(
        model="word-problems",
        adapter=None,
        quantization="auto",
        shape=None,
        sessions=1,
        prompt_tokens=60,
        turns=1,
    )
    noted: list[int] = []
    found = asyncio.run(bench.run(lambda each: noted.append(len(each["whole"]))))
    assert noted == [0, 1]
    assert found["in pieces"][0]["steps_beside"] > 0
    assert found["whole"][0]["first_block_ms_of_the_prompt"] > 0.0


@pytest.mark.usefixtures("one_core")
def test_engine_is_measured_under_load() -> None:
    bench = EngineLoads(
        model=None,
        adapter=None,
        quantization="auto",
        loads=[2],
        settings=["pays", "1 block"],
        turns=1,
        requests=1,
        max_new_tokens=16,
        seconds=None,
    )
    found = asyncio.run(bench.run(lambda _: None))
    assert found["captured_after_ready"] == []
    assert found["loads"]["2"]["1 block"]["answers"] == 2
    assert set(found["ratios"]["2"]) == {
        "tokens_per_s, to 1 block",
        "tokens_per_own_s, to 1 block",
    }
