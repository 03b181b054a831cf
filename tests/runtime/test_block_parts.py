"""Blocks that join in parts: what a reader gets are the same blocks, whole ones."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from d2f_runtime.decoding.blocks import Committed
from d2f_runtime.decoding.decoder import BlockDecoder
from d2f_runtime.decoding.width import OWN, Width, widths_of
from d2f_runtime.decoding.window import NO_TOKEN, Proposals, Window
from d2f_runtime.engine.request_kind import least_part
from d2f_stream.core.params import GenerationParams
from d2f_stream.core.presets import PRESETS
from decoding import limit, num_final, propose, random_case
from fakes import info
from reference_loop import MASK

EOS = 1


@pytest.mark.parametrize("seed", range(300))
def test_blocks_are_whole_whatever_their_parts(seed: int) -> None:
    rnd = random.Random(seed)
    case = random_case(rnd)
    while case.prompt_attention not in ("full", "causal"):
        case = random_case(rnd)
    decoder = case.decoder()
    cache: list[int] = []
    commits: list[Committed] = []
    text: list[int] = []
    step = 0
    while True:
        part = rnd.choice((None, 1, 2, 3, 5, case.block_size))
        window = decoder.next_window(Width(max_active_blocks=rnd.choice((None, 1)), part_size=part))
        if window is None:
            break
        step += 1
        check_window(window, cache)
        events = decoder.apply(propose(case, cache, window, step))
        cache += window.tokens[: window.num_to_cache]
        commits += [event for event in events if isinstance(event, Committed)]
        answer = decoder.answer_tokens
        assert decoder.num_useful_tokens == num_final(case, answer)
        views = decoder.active_blocks
        text = [token for commit in commits for token in commit.tokens]
        if not decoder.finished and not set(case.eos_ids).intersection(text):
            starts = [commits[-1].stop if commits else 0, *(view.stop for view in views)]
            assert [view.start for view in views] == starts[:-1]
            assert len({view.index for view in views} | {c.index for c in commits}) == len(
                views
            ) + len(commits)
            shown = [token for view in views for token in view.tokens]
            known = answer[decoder.num_useful_tokens :]
            assert shown[: len(known)] == list(known)
            assert set(shown[len(known) :]) <= {MASK}
    assert [commit.index for commit in commits] == list(range(len(commits)))
    assert [c.start for c in commits] == [0, *(c.stop for c in commits)][:-1]
    assert all(commit.stop % case.block_size == 0 for commit in commits[:-1])
    assert len(text) == limit(case) or text[-1] in case.eos_ids


def check_window(window: Window, cache: Sequence[int]) -> None:
    edges = [window.start, *window.block_stops]
    assert window.start == len(cache)
    assert edges == sorted(set(edges))
    assert edges[-1] == window.stop
    assert window.start + window.num_to_cache in edges
    assert MASK not in window.tokens[: window.num_to_cache]
    assert MASK in window.tokens


def test_single_tokens_are_what_the_model_says_next() -> None:
    def following(tokens: Sequence[int]) -> int:
        return 10 + (31 * len(tokens) + sum(tokens)) % 50

    params = GenerationParams(max_new_tokens=37, block_size=8, max_active_blocks=4)
    decoder = BlockDecoder(
        prompt_tokens=(10, 11, 12),
        params=params,
        mask_id=MASK,
        eos_ids=(EOS,),
        shift_logits=True,
        prompt_attention="causal",
        commit_attention="causal",
    )
    rows: list[int] = []
    canvas = [10, 11, 12]
    while (window := decoder.next_window(Width(max_active_blocks=1, part_size=1))) is not None:
        rows.append(window.num_forwarded(MASK, shift_logits=True))
        said = following(canvas)
        tokens = [NO_TOKEN] * (len(window.tokens) - 1) + [said]
        decoder.apply(Proposals(tokens, [0.0] * (len(window.tokens) - 1) + [0.5]))
        canvas.append(said)
    assert decoder.answer_tokens == tuple(canvas[3:])
    assert rows == [3, *[1] * 36]


def test_a_part_is_an_attention_block_until_it_is_cached() -> None:
    params = GenerationParams(max_new_tokens=16, block_size=8, max_active_blocks=1)
    decoder = BlockDecoder(prompt_tokens=(10, 11), params=params, mask_id=MASK, eos_ids=(EOS,))
    narrow = Width(max_active_blocks=1, part_size=4)
    window = decoder.next_window(narrow)
    assert window is not None
    assert (window.tokens, window.block_stops) == ((10, 11, *[MASK] * 4), (2, 6))
    events = decoder.apply(Proposals([NO_TOKEN] * 2 + [20, 21, 22, 23], [0.0] * 2 + [0.99] * 4))
    assert not [event for event in events if isinstance(event, Committed)]
    window = decoder.next_window(OWN)  # the rest of the block joins at once
    assert window is not None
    assert (window.start, window.tokens) == (2, (20, 21, 22, 23, *[MASK] * 4))
    assert (window.block_stops, window.num_to_cache) == ((6, 10), 4)
    events = decoder.apply(Proposals([NO_TOKEN] * 4 + [24, 25, 26, 27], [0.0] * 4 + [0.99] * 4))
    assert Committed(0, 0, 8, tuple(range(20, 28))) in events


def test_parts_are_for_models_that_know_them() -> None:
    assert least_part(info(prompt_attention="grid"), 32) is None
    assert least_part(info(prompt_attention="full"), 32) == 8
    causal = info(prompt_attention="causal", shift_logits=True)
    assert least_part(replace(causal, commit_attention="causal"), 8) == 1
    assert least_part(causal, 64) == 16
    assert widths_of(GenerationParams(), 8, least_part=least_part(causal, 8))[0].part_size is None
    widths = widths_of(GenerationParams(max_active_blocks=2), 32, least_part=8)
    assert widths == (
        Width(max_active_blocks=1, part_size=8),
        Width(max_active_blocks=1, part_size=16),
        Width(max_active_blocks=1),
        OWN,
    )
    assert widths_of(PRESETS["verified"], 8, least_part=1) == widths_of(PRESETS["verified"], 8)
    assert widths_of(PRESETS["llada-vanilla"], 8, least_part=1) == (OWN,)
