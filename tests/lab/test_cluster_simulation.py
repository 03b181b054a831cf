"""A simulated cluster keeps to what queues must do, and its bounds are where its costs put them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.cluster.costs import shares
from lab.cluster.scenarios import SERVERS_BUSY, scenarios
from lab.cluster.simulation import Costs, EngineModel, Outcome, carried, simulate

FREE = Costs(server_answer=0, server_block=0, store_answer=0, store_block=0, store_running_s=0)
ENGINE = EngineModel(paces=((1, 100.0), (4, 250.0)), answer_blocks=5)


def run(costs: Costs, *, engines: int = 2, servers: int = 1, load: float = 0.6) -> Outcome:
    return simulate(
        costs,
        ENGINE,
        engines=engines,
        servers=servers,
        answers_per_s=load * engines * ENGINE.answers_per_s,
        seconds=20.0,
    )


def test_where_nothing_costs_anything_no_block_is_late_and_engines_are_the_bound() -> None:
    found = run(FREE)
    assert found.late_ms == (0.0, 0.0)
    assert found.blocks_per_s == pytest.approx(0.6 * 2 * 250, rel=0.1)
    assert found.busy["engines"] == pytest.approx(0.6, rel=0.1)
    assert found.binds == "engines"


def test_engines_make_no_more_than_their_pace() -> None:
    found = run(FREE, load=3.0)
    assert found.blocks_per_s == pytest.approx(500, rel=0.01)


@pytest.mark.parametrize("part", ["server", "store"])
def test_a_core_sends_no_more_than_it_has_time_for(part: str) -> None:
    costs = Costs(**{**vars(FREE), f"{part}_block": 10_000.0})
    found = run(costs, load=0.9)
    assert found.blocks_per_s == pytest.approx(100, rel=0.02)  # 10 ms each, where 450 are made
    assert found.binds in (part, f"{part}s")
    assert found.busy[found.binds] == pytest.approx(1.0, abs=1e-6)
    assert found.late_ms[1] > 1000  # it falls behind


def test_more_servers_carry_what_one_does_not() -> None:
    costs = Costs(**{**vars(FREE), "server_block": 3_000.0})
    assert run(costs, load=0.8).binds == "servers"
    found = run(costs, load=0.8, servers=3)
    assert found.binds == "engines"
    assert found.busy["servers"] == pytest.approx(400 * 3_000e-6 / 3, rel=0.1)


def test_a_block_that_meets_no_other_is_late_by_what_it_costs() -> None:
    costs = Costs(**{**vars(FREE), "server_block": 300.0, "store_block": 200.0})
    assert run(costs, engines=1, load=0.05).late_ms[0] == pytest.approx(0.5)


def test_renewing_leases_takes_the_store_time_that_blocks_wait_for() -> None:
    found = run(Costs(**{**vars(FREE), "store_running_s": 20_000.0}), load=2.0)
    assert found.busy["store"] == pytest.approx(2 * 4 * 0.02, rel=0.05)  # all places are taken
    assert found.late_ms[1] > found.late_ms[0]


@settings(max_examples=6)
@given(
    server_answer=st.floats(100, 2_000),
    server_block=st.floats(50, 500),
    store_answer=st.floats(100, 1_000),
    store_block=st.floats(20, 300),
)
def test_as_many_engines_as_a_part_carries_keep_it_busy(
    server_answer: float, server_block: float, store_answer: float, store_block: float
) -> None:
    costs = Costs(
        server_answer=server_answer,
        server_block=server_block,
        store_answer=store_answer,
        store_block=store_block,
        store_running_s=0.0,
    )
    most = carried(costs, ENGINE, load=0.6)
    found = run(costs, engines=2, load=0.6)
    assert most["router"] >= most["server"]
    assert found.busy["store"] == pytest.approx(2 / most["store"], rel=0.15)
    assert found.busy["servers"] == pytest.approx(2 / most["server"], rel=0.15)
    assert found.router == pytest.approx(2 / most["router"], rel=0.3, abs=0.01)


def test_the_same_seed_is_the_same_cluster() -> None:
    costs = Costs(**{**vars(FREE), "store_block": 500.0})
    assert run(costs) == run(costs)


def test_two_lengths_tell_an_answers_share_from_a_blocks() -> None:
    assert shares((5, 700.0 + 5 * 90.0), (41, 700.0 + 41 * 90.0)) == {"answer": 700, "block": 90}


def test_the_records_simulate_with_as_many_servers_as_they_need() -> None:
    found = scenarios([3])
    assert found["most_per_s"]["store_block"] > found["most_per_s"]["server_answer"] > 0
    for name in set(found["sources"]) - {"costs"}:
        enough = found[name]["engines"]["3"][-1]
        assert enough["busy"]["servers"] < SERVERS_BUSY + 0.1
        assert enough["blocks_per_s"] > 0
