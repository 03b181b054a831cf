from collections.abc import Sequence

import pytest

from d2f_runtime.decoding.decoder import Accepted, BlockDecoder, BlockView, Committed
from d2f_runtime.decoding.width import Width
from d2f_runtime.decoding.window import NO_TOKEN, Proposals, Window
from d2f_stream.core.errors import InvalidPrompt
from d2f_stream.core.params import GenerationParams, ParamOverrides
from stepping import EOS, EOT, PROMPT, M, pending, proposals, step

SMALL = GenerationParams(max_new_tokens=8, block_size=4, add_threshold=0.25, activate_threshold=0.5)


def small(params: ParamOverrides | None = None, prompt: Sequence[int] = PROMPT) -> BlockDecoder:
    """Return a decoder of two blocks of four after a prompt of three."""
    changed = SMALL.with_overrides(params or {})
    return BlockDecoder(prompt_tokens=prompt, params=changed, mask_id=M, eos_ids=(EOS, EOT))


def test_first_window_holds_prompt_and_one_block() -> None:
    assert small().next_window() == Window(
        start=0, tokens=(*PROMPT, M, M, M, M), num_to_cache=3, block_stops=(3, 7)
    )


def test_window_is_the_same_until_proposals_are_applied() -> None:
    decoder = small()
    assert decoder.next_window() is decoder.next_window(Width(max_active_blocks=1))


def test_confident_proposals_are_accepted_by_position() -> None:
    assert step(small(), {2: 22, 0: 20}) == [Accepted(0, 20), Accepted(2, 22)]


def test_fully_activated_block_forces_best_proposal() -> None:
    assert step(small(), {}) == [Accepted(0, 50)]


def test_prompt_is_cached_by_the_first_step() -> None:
    decoder = small({"add_threshold": 1.0})
    step(decoder, {1: 21})
    window = pending(decoder)
    assert window == Window(start=3, tokens=(M, 21, M, M), num_to_cache=0, block_stops=(7,))
    assert decoder.num_cached == 3


def test_next_block_joins_once_enough_is_filled() -> None:
    decoder = small({"add_threshold": 0.5})
    step(decoder, {0: 20})
    assert len(pending(decoder).tokens) == 4
    step(decoder, {1: 21})
    assert pending(decoder).block_stops == (7, 11)


def test_semi_activated_block_accepts_only_confident_proposals() -> None:
    decoder = small({"activate_threshold": 1.0})
    step(decoder, {0: 20})
    assert step(decoder, {}) == [Accepted(1, 50)]
    assert step(decoder, {5: 25}) == [Accepted(2, 50), Accepted(5, 25)]


def test_progress_of_the_step_itself_activates_nothing() -> None:
    decoder = small()
    step(decoder, {0: 20})
    assert step(decoder, {1: 21, 2: 22}) == [Accepted(1, 21), Accepted(2, 22)]
    assert step(decoder, {}) == [
        Accepted(3, 50),
        Accepted(4, 50),
        Committed(0, 0, 4, (20, 21, 22, 50)),
    ]


def test_filled_block_is_committed_and_then_cached_beside_the_next() -> None:
    decoder = small()
    events = step(decoder, {0: 20, 1: 21, 2: 22, 3: 23})
    assert events[-1] == Committed(index=0, start=0, stop=4, tokens=(20, 21, 22, 23))
    window = pending(decoder)
    assert (window.start, window.num_to_cache, window.block_stops) == (3, 4, (7, 11))


def test_block_filled_out_of_order_waits_for_the_earlier_one() -> None:
    decoder = small()
    step(decoder, {0: 20})
    events = step(decoder, {1: 21, 4: 24, 5: 25, 6: 26, 7: 27})
    assert not [event for event in events if isinstance(event, Committed)]
    assert pending(decoder).num_to_cache == 0
    assert len(decoder.active_blocks) == 2
    commits = step(decoder, {2: 22, 3: 23})[2:]
    assert commits == [Committed(0, 0, 4, (20, 21, 22, 23)), Committed(1, 4, 8, (24, 25, 26, 27))]
    assert (decoder.next_window(), decoder.finish_reason) == (None, "length")


def test_eos_drops_later_blocks_at_once() -> None:
    decoder = small()
    step(decoder, {0: 20})
    assert step(decoder, {2: EOS, 5: 25}) == [Accepted(2, EOS)]
    assert pending(decoder).tokens == (20, M, EOS, M)
    assert step(decoder, {1: 21}) == [Accepted(1, 21), Committed(0, 0, 3, (20, 21, EOS))]
    assert (decoder.next_window(), decoder.finish_reason) == (None, "eos")
    assert (decoder.num_steps, decoder.num_useful_tokens) == (3, 3)
    assert decoder.answer_tokens == (20, 21, EOS, M)


def test_positions_after_an_eos_in_its_block_go_on() -> None:
    decoder = small()
    assert step(decoder, {2: EOS, 3: 23}) == [Accepted(2, EOS), Accepted(3, 23)]


def test_earlier_eos_wins_over_one_accepted_before() -> None:
    decoder = small()
    step(decoder, {0: 20})
    step(decoder, {6: EOS})
    assert len(decoder.active_blocks) == 2
    events = step(decoder, {2: EOT, 4: 24})
    assert events == [Accepted(2, EOT), Committed(0, 0, 3, (20, 50, EOT))]
    assert decoder.finished


def test_earlier_eos_in_the_same_block_ends_the_answer() -> None:
    decoder = small()
    step(decoder, {3: EOS})
    assert step(decoder, {0: 20, 1: EOS}) == [
        Accepted(0, 20),
        Accepted(1, EOS),
        Committed(0, 0, 2, (20, EOS)),
    ]


def test_draining_goes_on_after_the_last_commit() -> None:
    decoder = small({"stop_at_eos": "drain"})
    step(decoder, {1: 21})
    events = step(decoder, {0: EOS, 5: 25})
    assert events[-1] == Committed(0, 0, 1, (EOS,))
    assert (decoder.finished, decoder.finish_reason, decoder.active_blocks) == (False, None, ())
    while decoder.next_window():
        events = step(decoder, {})
    assert not any(isinstance(event, Committed) for event in events)
    assert (decoder.finish_reason, decoder.num_useful_tokens) == ("eos", 1)
    assert M not in decoder.answer_tokens


def test_no_block_joins_after_an_eos() -> None:
    decoder = small({"stop_at_eos": "drain"})
    step(decoder, {3: EOS})
    assert pending(decoder).block_stops == (7,)


def test_eos_in_the_prompt_means_nothing() -> None:
    decoder = small(prompt=(10, EOS, 12))
    step(decoder, {0: 20})
    assert pending(decoder).block_stops == (7, 11)


def test_last_block_is_cut_at_max_new_tokens() -> None:
    decoder = small({"max_new_tokens": 6})
    step(decoder, {0: 20, 1: 21, 2: 22, 3: 23})
    assert pending(decoder).block_stops == (7, 9)
    assert step(decoder, {4: 24, 5: 25})[-1] == Committed(1, 4, 6, (24, 25))
    assert decoder.finish_reason == "length"


def test_tail_can_be_dropped() -> None:
    decoder = small({"max_new_tokens": 6, "tail": "drop"})
    step(decoder, {0: 20, 1: 21, 2: 22, 3: 23})
    assert decoder.next_window() is None


def test_unfilled_blocks_are_bounded() -> None:
    decoder = small({"max_active_blocks": 1})
    step(decoder, {0: 20})
    assert len(pending(decoder).tokens) == 4


def test_bound_of_one_step_tightens_the_request() -> None:
    decoder = small()
    step(decoder, {0: 20})
    decoder.next_window(Width(max_active_blocks=1))
    assert len(pending(decoder).tokens) == 4
    step(decoder, {1: 21})
    decoder.next_window(Width(max_active_blocks=9))
    assert len(pending(decoder).tokens) == 8


def test_active_blocks_show_what_is_not_committed() -> None:
    decoder = small()
    step(decoder, {0: 20})
    decoder.next_window()
    assert decoder.active_blocks == (
        BlockView(index=0, start=0, stop=4, tokens=(20, M, M, M)),
        BlockView(index=1, start=4, stop=8, tokens=(M, M, M, M)),
    )


def test_prompt_with_the_mask_id_is_refused() -> None:
    with pytest.raises(InvalidPrompt, match="mask id 99 at position 1"):
        small(prompt=(10, M, 12))


def test_empty_prompt_is_refused_where_position_zero_cannot_be_filled() -> None:
    with pytest.raises(InvalidPrompt, match="empty"):
        BlockDecoder(prompt_tokens=(), params=SMALL, mask_id=M, eos_ids=(), shift_logits=True)
    assert small(prompt=()).next_window() == Window(0, (M, M, M, M), 0, (4,))


def test_proposals_must_belong_to_the_window() -> None:
    decoder = small()
    with pytest.raises(RuntimeError, match="no window is pending"):
        decoder.apply(Proposals([], []))
    good = proposals(pending(decoder), {})
    for bad in (
        Proposals(good.tokens[1:], good.confidence[1:]),
        Proposals(good.tokens, good.confidence, [0.0]),
    ):
        with pytest.raises(RuntimeError, match="for a window of 7"):
            decoder.apply(bad)


def test_proposed_mask_is_an_internal_error() -> None:
    decoder = small()
    with pytest.raises(RuntimeError, match="position 5 names the mask id 99"):
        step(decoder, {2: M})


def test_missing_proposal_is_an_internal_error() -> None:
    with pytest.raises(RuntimeError, match="no proposal at canvas position 4"):
        step(small(), {1: NO_TOKEN})


def test_rank_is_required_where_the_request_ranks_by_it() -> None:
    with pytest.raises(RuntimeError, match="ranks by margin"):
        step(small({"rank": "margin"}), {})


class Lazy:
    """A policy that breaks its contract."""

    def __init__(self, offsets: list[int]) -> None:
        self.offsets = offsets

    def accept(
        self,
        masked: Sequence[int],
        confidence: Sequence[float],
        rank: Sequence[float],
        *,
        fully_activated: bool,
    ) -> Sequence[int]:
        return self.offsets


@pytest.mark.parametrize(
    ("offsets", "message"), [([], "accepted nothing"), ([0, 0], "not all masked")]
)
def test_policy_that_breaks_its_contract_is_an_internal_error(
    offsets: list[int], message: str
) -> None:
    decoder = BlockDecoder(
        prompt_tokens=PROMPT, params=SMALL, mask_id=M, eos_ids=(EOS,), policy=Lazy(offsets)
    )
    with pytest.raises(RuntimeError, match=message):
        step(decoder, {})
