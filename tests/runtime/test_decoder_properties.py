import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_runtime.decoding.policy import FixedCountPolicy
from d2f_stream.core.errors import InvalidParams
from decoding import Case, Run, checked_run, propose, random_case
from reference_loop import MASK, reference_loop

NUM_CASES = 2400


def drawn(rnd: random.Random) -> Case:
    """Draw a case in which at least one block fits."""
    while True:
        case = random_case(rnd)
        try:
            case.decoder()
        except InvalidParams:
            continue
        return case


cases = st.randoms(use_true_random=False).map(drawn)


def seeded_cases(seed: int, count: int) -> Iterator[Case]:
    rnd = random.Random(seed)
    for _ in range(count):
        yield drawn(rnd)


def check_parity(case: Case) -> Run:
    case = case.with_params(stop_at_eos="drain")
    rank = case.params.rank

    def proposals(visible: tuple[int, ...], position: int, step: int) -> tuple[int, float, float]:
        token, confidence, score = case.model(visible, position, step)
        return token, confidence, confidence if rank == "confidence" else score

    expected = reference_loop(case.prompt, proposals, case.settings())
    decoder = case.decoder()
    run = checked_run(case, decoder=decoder)
    num_prompt = len(case.prompt)
    assert len(run.accepted) == len(expected.steps)
    for window, accepted, step in zip(run.windows, run.accepted, expected.steps, strict=True):
        shown = step.tokens[: len(window.tokens)]
        assert (window.start, list(window.tokens)) == (step.start, shown)
        check_hidden(case, step.tokens[len(shown) - 1 :])
        assert window.num_to_cache == step.new_kv
        got = [(event.position + num_prompt, event.token) for event in accepted]
        assert got == step.accepted
    assert [*case.prompt, *decoder.answer_tokens] == expected.canvas
    return run


def check_hidden(case: Case, tail: list[int]) -> None:
    """What a window leaves out is all but the first mask of a block that awaits that one."""
    if len(tail) > 1:
        assert case.shifted
        assert case.params.sub_block_size
        assert set(tail) == {MASK}
        assert len(tail) <= case.block_size


def cut_at_eos(case: Case, tokens: tuple[int, ...]) -> tuple[int, ...]:
    stops = [at + 1 for at, token in enumerate(tokens) if token in case.eos_ids]
    return tokens[: min(stops, default=len(tokens))]


def check_truncation(case: Case) -> None:
    decoder = case.with_params(stop_at_eos="drain").decoder()
    drained = checked_run(case.with_params(stop_at_eos="drain"), decoder=decoder)
    truncated = checked_run(case.with_params(stop_at_eos="truncate"))
    assert truncated.text == drained.text == cut_at_eos(case, decoder.answer_tokens)
    assert truncated.commits == drained.commits
    assert len(truncated.windows) <= len(drained.windows)


@pytest.mark.parametrize("seed", range(3))
def test_seeded_cases_take_the_reference_loop_step_by_step(seed: int) -> None:
    for case in seeded_cases(seed, NUM_CASES // 3):
        check_parity(case)


@given(cases)
@settings(max_examples=60)
def test_decoder_takes_the_reference_loop_step_by_step(case: Case) -> None:
    check_parity(case)


def test_seeded_truncated_text_is_the_drained_text_cut_at_the_first_eos() -> None:
    for case in seeded_cases(10, 400):
        check_truncation(case)


@given(cases)
@settings(max_examples=60)
def test_truncated_text_is_the_drained_text_cut_at_the_first_eos(case: Case) -> None:
    check_truncation(case)


@given(cases, st.lists(st.integers(0, 4) | st.none(), max_size=12))
@settings(max_examples=60)
def test_windows_narrowed_at_any_step_still_finish(case: Case, bounds: list[int | None]) -> None:
    checked_run(case, bound=lambda step: dict(enumerate(bounds, 1)).get(step))


@given(cases)
@settings(max_examples=40)
def test_block_size_one_on_a_causal_prompt_is_autoregression(case: Case) -> None:
    case = case.with_params(block_size=1, stop_at_eos="truncate", rank="confidence")
    run = checked_run(Case(case.prompt, case.params, case.model, case.eos_ids, "causal"))
    canvas = list(case.prompt)
    for step in range(1, case.params.max_new_tokens + 1):
        canvas.append(case.model((*canvas, MASK), len(canvas), step)[0])
        if canvas[-1] in case.eos_ids:
            break
    assert run.text == tuple(canvas[len(case.prompt) :])
    assert len(run.windows) == len(run.text)
    assert all(len(window.tokens) == 2 for window in run.windows[1:])


@given(cases, st.integers(1, 9))
@settings(max_examples=40)
def test_fixed_count_fills_one_block_after_the_other(case: Case, num_per_step: int) -> None:
    case = case.with_params(max_active_blocks=1, stop_at_eos="drain", sub_block_size=0)
    policy = FixedCountPolicy(num_per_step)
    run = checked_run(case, decoder=case.decoder(policy=policy))
    for window, accepted in zip(run.windows, run.accepted, strict=True):
        assert len(accepted) == min(num_per_step, window.tokens.count(MASK))


def test_random_cases_cover_what_they_should() -> None:
    seen = {"eos out of order": 0, "waiting block": 0, "two retire": 0, "eos first": 0, "long": 0}
    for case in seeded_cases(20, 300):
        run = checked_run(case)
        eos = [e.position for step in run.accepted for e in step if e.token in case.eos_ids]
        seen["eos out of order"] += any(late < early for early, late in pairwise(eos))
        seen["eos first"] += run.text[0] in case.eos_ids
        seen["two retire"] += any(w.num_to_cache >= 2 * case.block_size for w in run.windows[1:])
        seen["long"] += any(len(w.tokens) > 4 * case.block_size for w in run.windows[1:])
        for window in run.windows[1:]:
            stops = (window.start, *window.block_stops)
            has_mask = [
                MASK in window.tokens[a - window.start : b - window.start]
                for a, b in pairwise(stops)
            ]
            seen["waiting block"] += any(not last and first for first, last in pairwise(has_mask))
    assert min(seen.values()) >= 5, seen


def test_proposals_see_only_what_the_window_allows() -> None:
    case = next(case for case in seeded_cases(30, 50) if case.prompt_attention == "full")
    window = case.decoder().next_window()
    assert window is not None
    proposals = propose(case, (), window, 1)
    assert [token >= 0 for token in proposals.tokens] == [t == MASK for t in window.tokens]
