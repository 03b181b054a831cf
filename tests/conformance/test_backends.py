"""What every backend must do, whatever it is made of: what its steps propose."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backend_rigs import TOLERANCE, Canvas, Rig, assert_same, cache_up_to, canvas, expected
from d2f_runtime.backends.base import StepRow
from d2f_runtime.decoding.window import NO_TOKEN, Proposals
from tiny_models import MASK, NUM_TOKENS, recompute

pytestmark = pytest.mark.torch


def run(rig: Rig, case: Canvas, edges: Sequence[int], num_to_cache: int = 0) -> Proposals:
    """Cache at the edges in turn, then answer the rest of the canvas, in a slot of its own."""
    slot = rig.backend.open_slot(len(case.tokens))
    cache_up_to(rig.backend, slot, case, edges)
    window = case.window(edges[-1] if edges else 0, num_to_cache)
    (found,) = rig.backend.step([StepRow(slot, window)])
    rig.backend.close_slot(slot)
    return found


@pytest.mark.parametrize("edges", [(), (11,), (15,), (11, 15)])
def test_cached_steps_equal_a_recompute(rig: Rig, edges: tuple[int, ...]) -> None:
    case = canvas(1)
    window = case.window(edges[-1] if edges else 0)
    assert_same(run(rig, case, edges), expected(rig, case, window))


@settings(
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
@given(
    seed=st.integers(0, 10_000),
    filled=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    masked=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    data=st.data(),
)
def test_any_partition_equals_a_recompute(
    rig: Rig, seed: int, filled: list[int], masked: list[int], data: st.DataObject
) -> None:
    case = canvas(seed, sizes=filled + masked, num_filled=len(filled))
    edges = sorted(data.draw(st.sets(st.sampled_from(case.stops[: len(filled)]))))
    start = edges[-1] if edges else 0
    later = [s - start for s in case.stops[: len(filled)] if s > start]
    num_to_cache = data.draw(st.sampled_from([0, *later]))
    found = run(rig, case, edges, num_to_cache)
    assert_same(found, expected(rig, case, case.window(start)))


def test_proposals_are_at_masks_and_never_forbidden(rig: Rig) -> None:
    case = canvas(2, sizes=(9, 16, 16), num_filled=1)
    found = run(rig, case, (9,))
    for token, proposed, confidence in zip(
        case.tokens[9:], found.tokens, found.confidence, strict=True
    ):
        if token == MASK:
            assert 0 <= proposed < NUM_TOKENS
            assert proposed != MASK
            assert 0.0 < confidence <= 1.0
        else:
            assert (proposed, confidence) == (NO_TOKEN, 0.0)
    assert found.rank is None


@pytest.mark.parametrize("rank", ["margin", "neg_entropy"])
def test_ranks_come_where_they_are_asked_for(rig: Rig, rank: str) -> None:
    case = canvas(3)
    slots = [rig.backend.open_slot(len(case.tokens)) for _ in range(2)]
    rows = [StepRow(slot, case.window(0)) for slot in slots]
    rows[0] = replace(rows[0], rank="margin" if rank == "margin" else "neg_entropy")
    with_rank, without = rig.backend.step(rows)
    for slot in slots:
        rig.backend.close_slot(slot)
    assert without.rank is None
    assert with_rank.rank is not None
    assert with_rank.confidence == pytest.approx(without.confidence, abs=TOLERANCE)
    at_masks = [r for t, r in zip(case.tokens, with_rank.rank, strict=True) if t == MASK]
    assert all(0 < r <= 1 for r in at_masks) if rank == "margin" else all(r < 0 for r in at_masks)


def test_sampling_follows_the_uniform_numbers(rig: Rig) -> None:
    case = canvas(4, sizes=(10, 16, 16), num_filled=1)
    rng = random.Random(4)
    uniforms = [rng.random() for _ in range(32)]
    slot = rig.backend.open_slot(64)
    cache_up_to(rig.backend, slot, case, (10,))
    window = case.window(10)
    row = StepRow(slot, window, temperature=0.8, uniforms=uniforms)
    (found,) = rig.backend.step([row])
    rig.backend.close_slot(slot)
    wanted = recompute(rig.model, window, *case.cached(10), temperature=0.8, uniforms=uniforms)
    assert_same(found, wanted)
    greedy = recompute(rig.model, window, *case.cached(10))
    assert list(found.tokens) != list(greedy.tokens)


def test_copied_prefix_serves_as_if_it_had_been_computed(rig: Rig) -> None:
    case = canvas(6)
    source, target = rig.backend.open_slot(64), rig.backend.open_slot(len(case.tokens))
    cache_up_to(rig.backend, source, case, case.stops[:2])
    rig.backend.copy_prefix(source, target, case.stops[0])
    rig.backend.close_slot(source)  # and what is computed next may lie where it lay
    other = rig.backend.open_slot(64)
    cache_up_to(rig.backend, other, canvas(7), (11,))
    window = case.window(case.stops[0])
    (found,) = rig.backend.step([StepRow(target, window)])
    for slot in (target, other):
        rig.backend.close_slot(slot)
    wanted = expected(rig, case, window)
    first = 1 if rig.shifted and case.tokens[window.start] == MASK else 0
    assert_same(
        Proposals(found.tokens[first:], found.confidence[first:]),
        Proposals(wanted.tokens[first:], wanted.confidence[first:]),
    )


def test_rows_of_a_step_do_not_touch_each_other(rig: Rig) -> None:
    cases = [canvas(seed, sizes=(5 + 3 * seed, 4, 3 + seed)) for seed in range(5)]
    slots = [rig.backend.open_slot(64) for _ in cases]
    starts = [case.stops[0] for case in cases]
    rig.backend.step(
        [StepRow(s, c.window(0, n, n)) for s, c, n in zip(slots, cases, starts, strict=True)]
    )
    # Some cache another block in the same step in which others only look, in another order.
    order = [3, 0, 4, 1, 2]
    rows = []
    for index in order:
        start = starts[index]
        num_to_cache = cases[index].stops[1] - start if index % 2 else 0
        rows.append(StepRow(slots[index], cases[index].window(start, num_to_cache)))
    for index, found in zip(order, rig.backend.step(rows), strict=True):
        case = cases[index]
        assert_same(found, expected(rig, case, case.window(starts[index])))
    for slot, case, index in zip(slots, cases, range(5), strict=True):
        start = case.stops[1] if index % 2 else starts[index]
        (found,) = rig.backend.step([StepRow(slot, case.window(start))])
        assert_same(found, expected(rig, case, case.window(start)))
        rig.backend.close_slot(slot)


def test_greedy_and_sampled_rows_share_a_step(rig: Rig) -> None:
    case = canvas(5)
    uniforms = [0.37] * len(case.tokens)
    slots = [rig.backend.open_slot(64), rig.backend.open_slot(64)]
    found = rig.backend.step(
        [
            StepRow(slots[0], case.window(0)),
            StepRow(slots[1], case.window(0), temperature=1.3, uniforms=uniforms),
        ]
    )
    assert_same(found[0], expected(rig, case, case.window(0)))
    wanted = recompute(rig.model, case.window(0), (), (), temperature=1.3, uniforms=uniforms)
    assert_same(found[1], wanted)
    for slot in slots:
        rig.backend.close_slot(slot)


def test_a_trailing_lone_mask_is_predicted_without_being_seen(rig: Rig) -> None:
    tokens = tuple(random.Random(10).randrange(4, NUM_TOKENS) for _ in range(6))
    case = Canvas((*tokens, MASK), tuple(range(1, 8)))
    assert_same(run(rig, case, ()), expected(rig, case, case.window(0)))
    assert_same(run(rig, case, (5,)), expected(rig, case, case.window(5)))
    # ... also where nothing else is left to run, alone and beside other rows
    assert_same(run(rig, case, (6,)), expected(rig, case, case.window(6)))
    slots = [rig.backend.open_slot(16) for _ in range(2)]
    rows = []
    for slot, start in zip(slots, (6, 2), strict=True):
        cache_up_to(rig.backend, slot, case, (start,))
        rows.append(StepRow(slot, case.window(start)))
    for row, found in zip(rows, rig.backend.step(rows), strict=True):
        assert_same(found, expected(rig, case, row.window))
        rig.backend.close_slot(row.slot)


def test_no_rows_no_answers(rig: Rig) -> None:
    assert rig.backend.step([]) == []


def test_a_window_without_masks_proposes_nothing(rig: Rig) -> None:
    case = canvas(11, sizes=(5, 4), num_filled=2)
    found = run(rig, case, (5,), 4)
    assert found == Proposals([NO_TOKEN] * 4, [0.0] * 4)
