import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_runtime.decoding.decoder import Accepted, BlockDecoder, Committed
from d2f_runtime.decoding.lookahead import Candidate, Lookahead
from d2f_runtime.decoding.window import Proposals, Window
from d2f_stream.core.errors import InvalidParams
from d2f_stream.core.params import GenerationParams
from decoding import Case, checked_run, random_case
from reference_loop import MASK

EOS = 1


class KeepAnchor:
    """Tries everything and takes none of it."""

    def branches(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        return candidates

    def choose(
        self, windows: Sequence[Window], proposals: Sequence[Proposals], mask_id: int
    ) -> int:
        return 0


def with_lookahead(rnd: random.Random) -> Case:
    return random_case(rnd).with_params(lookahead=rnd.randint(1, 6))


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_invariant_of_the_decoder_holds_with_branches(seed: int) -> None:
    checked_run(with_lookahead(random.Random(seed)))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_branches_that_never_win_change_nothing(seed: int) -> None:
    case = with_lookahead(random.Random(seed))
    plain = case.with_params(lookahead=0)
    decoder = BlockDecoder(
        prompt_tokens=case.prompt,
        params=case.params.with_overrides({"lookahead": 16}),
        mask_id=MASK,
        eos_ids=case.eos_ids,
        shift_logits=case.shifted,
        prompt_attention=case.prompt_attention,
        native_block_size=case.block_size,
        branch_policy=KeepAnchor(),
    )
    found: list[object] = []
    expected = plain.decoder()
    while windows := expected.next_windows():
        branches = decoder.next_windows()
        assert branches[0] == windows[0]
        rows = [
            Proposals(
                [7 if t == MASK else -1 for t in w.tokens],
                [0.5] * len(w.tokens),
                [0.0] * len(w.tokens),
            )
            for w in branches
        ]
        found = list(decoder.apply(rows))
        assert found == expected.apply(rows[:1])
    assert decoder.finished


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_lost_cache_changes_no_answer(seed: int) -> None:
    rnd = random.Random(seed)
    case = with_lookahead(rnd)
    decoder = case.decoder()
    lost = {rnd.randint(1, 20) for _ in range(4)}

    def disturb(step: int) -> None:
        if step in lost:
            decoder.forget_cache()

    assert checked_run(case, decoder=decoder, before_apply=disturb).text == checked_run(case).text


def small(lookahead: int = 2) -> BlockDecoder:
    params = GenerationParams(max_new_tokens=4, block_size=4, lookahead=lookahead)
    return BlockDecoder(prompt_tokens=(9,), params=params, mask_id=MASK, eos_ids=(EOS,))


def row(
    window: Window, confidence: dict[int, float], tokens: dict[int, int] | None = None
) -> Proposals:
    """Proposals by answer position: token 20 + position unless given."""
    masks = {at: at + window.start - 1 for at, token in enumerate(window.tokens) if token == MASK}
    chosen = {p: (tokens or {}).get(p, 20 + p) for p in masks.values()}
    return Proposals(
        [chosen[masks[at]] if at in masks else -1 for at in range(len(window.tokens))],
        [
            confidence.get(masks[at], 0.1) if at in masks else 0.0
            for at in range(len(window.tokens))
        ],
    )


def test_winning_branch_becomes_the_canvas() -> None:
    decoder = small()
    (first,) = decoder.next_windows()
    decoder.apply([row(first, {0: 0.95, 2: 0.6, 3: 0.5})])
    anchor, on_2, on_3 = decoder.next_windows()
    assert anchor.tokens == (20, MASK, MASK, MASK)
    assert on_2.tokens == (20, MASK, 22, MASK)
    assert on_3.tokens == (20, MASK, MASK, 23)
    events = decoder.apply(
        [row(anchor, {1: 0.2}), row(on_2, {1: 0.3, 3: 0.3}), row(on_3, {1: 0.99, 2: 0.95})]
    )
    assert events == [
        *(Accepted(1, 21), Accepted(2, 22), Accepted(3, 23)),
        Committed(0, 0, 4, (20, 21, 22, 23)),
    ]
    assert decoder.num_steps == 2


def test_anchor_wins_a_tie() -> None:
    decoder = small(lookahead=1)
    (first,) = decoder.next_windows()
    decoder.apply([row(first, {})])
    windows = decoder.next_windows()
    assert len(windows) == 2
    assert decoder.apply([row(w, {}, {2: 50}) for w in windows])[0] == Accepted(1, 21)


def test_branch_may_bring_the_end() -> None:
    decoder = small(lookahead=1)
    (first,) = decoder.next_windows()
    decoder.apply([row(first, {0: 0.95, 2: 0.8}, {2: EOS})])
    anchor, branch = decoder.next_windows()
    assert branch.tokens == (20, MASK, EOS, MASK)
    events = decoder.apply([row(anchor, {}), row(branch, {1: 0.95})])
    assert events[-1] == Committed(0, 0, 3, (20, 21, EOS))
    assert decoder.finished


def test_most_confident_candidates_are_tried_leftmost_first_at_a_tie() -> None:
    candidates = [Candidate(p, 20 + p, c) for p, c in ((4, 0.5), (2, 0.7), (3, 0.5), (1, 0.1))]
    chosen = Lookahead(3).branches(candidates)
    assert [candidate.position for candidate in chosen] == [2, 3, 4]


def test_one_mask_left_is_not_branched() -> None:
    decoder = small(lookahead=16)
    (first,) = decoder.next_windows()
    decoder.apply([row(first, {0: 0.95, 1: 0.95, 2: 0.95})])
    assert len(decoder.next_windows()) == 1


@pytest.mark.parametrize("lookahead", [-1, 17])
def test_number_of_branches_is_bounded(lookahead: int) -> None:
    with pytest.raises(InvalidParams, match="lookahead"):
        GenerationParams(lookahead=lookahead)
