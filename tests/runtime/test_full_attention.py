"""Full attention in the decoder: the whole canvas in every window, nothing cached."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_runtime.decoding.decoder import BlockDecoder, Committed
from d2f_runtime.decoding.window import Window
from d2f_runtime.engine.local import Limits
from d2f_stream.core.errors import InvalidParams
from d2f_stream.core.params import Attention, GenerationParams
from decoding import Case, propose, random_case
from fakes import ANSWER, engine_over, info, params
from reference_loop import MASK


def full_case(rnd: random.Random) -> Case:
    case = random_case(rnd)
    model = replace(case.model, by_step=False)  # a model sees tokens, not time
    num_per_step = rnd.choice((0, 0, 1, 2, 5))
    return replace(case, prompt_attention="full", model=model).with_params(
        attention="full", num_per_step=num_per_step
    )


def run(case: Case) -> tuple[list[Window], list[Committed], BlockDecoder]:
    decoder = case.decoder()
    windows: list[Window] = []
    commits: list[Committed] = []
    while window := decoder.next_window():
        windows.append(window)
        found = decoder.apply(propose(case, (), window, len(windows)))
        commits += [e for e in found if isinstance(e, Committed)]
        assert len(windows) <= case.params.max_new_tokens
    return windows, commits, decoder


@settings(max_examples=300)
@given(seed=st.integers(0, 2**32))
def test_every_window_is_the_whole_canvas_to_come(seed: int) -> None:
    case = full_case(random.Random(seed))
    windows, commits, decoder = run(case)
    new = case.params.max_new_tokens
    new -= new % case.block_size if case.params.tail == "drop" else 0
    for window in windows:
        assert (window.start, window.num_to_cache) == (0, 0)
        assert window.block_stops == (len(case.prompt) + new,)
        assert len(window.tokens) == len(case.prompt) + new
        assert window.tokens[: len(case.prompt)] == case.prompt
    for before, after in pairwise(windows):
        changed = [(b, a) for b, a in zip(before.tokens, after.tokens, strict=True) if a != b]
        assert changed or case.params.num_per_step == 0
        assert all(token == MASK for token, _ in changed)  # what is accepted stays
    assert decoder.num_cached == 0
    assert [c.start for c in commits] == [0, *(c.stop for c in commits[:-1])]


@settings(max_examples=300)
@given(seed=st.integers(0, 2**32))
def test_truncated_text_is_the_drained_one_up_to_its_first_eos(seed: int) -> None:
    case = full_case(random.Random(seed))
    drained_windows, drained, decoder = run(case.with_params(stop_at_eos="drain"))
    windows, truncated, _ = run(case.with_params(stop_at_eos="truncate"))
    assert MASK not in decoder.answer_tokens
    assert windows == drained_windows[: len(windows)]
    text = [token for commit in drained for token in commit.tokens]
    assert [token for commit in truncated for token in commit.tokens] == text
    assert not any(token in case.eos_ids for token in text[:-1])


def test_full_attention_is_refused_for_a_causal_model() -> None:
    with pytest.raises(InvalidParams, match="attention is 'full'"):
        BlockDecoder(
            prompt_tokens=(5, 6, 7, 8),
            params=GenerationParams(attention="full"),
            mask_id=MASK,
            eos_ids=(1,),
            prompt_attention="causal",
        )


@pytest.mark.parametrize(("attention", "most"), [("blocks", 2), ("full", 1)])
async def test_sessions_share_a_step_by_what_their_windows_really_hold(
    attention: Attention, most: int
) -> None:
    rows: list[int] = []
    settings = params(max_new_tokens=128, attention=attention, max_active_blocks=1)
    async with engine_over(
        ScriptedBackend(answers=ANSWER), limits=Limits(max_step_tokens=200)
    ) as engine:
        engine.on_step(lambda _, number: rows.append(number))
        sessions = [engine.generate("prompt", settings) for _ in range(2)]
        assert [(await session.result()).text for session in sessions] == [ANSWER] * 2
    assert max(rows) == most


async def test_block_size_is_not_bound_by_what_attention_blocks_are() -> None:
    large = {"block_size": 128, "max_new_tokens": 128}
    backend = ScriptedBackend(answers=ANSWER, info=info(max_block_size=64))
    async with engine_over(backend) as engine:
        with pytest.raises(InvalidParams, match="block_size is 128"):
            engine.generate("prompt", params(**large))
        session = engine.generate("prompt", params(**large, attention="full"))
        assert (await session.result()).text == ANSWER
