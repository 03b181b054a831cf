"""Decoding by schedules and thresholds, against the published loops, step for step."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import block_loops
from block_loops import Loop, Rule
from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend
from d2f_runtime.decoding.decoder import BlockDecoder
from d2f_runtime.decoding.schedule import shares
from d2f_runtime.decoding.window import NO_TOKEN, Proposals, Window
from d2f_runtime.engine.local import LocalEngine
from d2f_stream.core.errors import InvalidParams, PromptTooLong
from d2f_stream.core.params import GenerationParams
from fakes import check_clean, info

MASK, EOS = 99, (1, 2)
LEVELS = 16  # confidences and thresholds share a coarse scale, so that ties and equality happen


def proposer(seed: int, eos_share: float) -> block_loops.Propose:
    """Return a model whose proposals are a fixed function of what a row sees."""

    def propose(visible: tuple[int, ...], position: int) -> tuple[int, float]:
        rng = random.Random(hash((seed, visible, position)))
        token = rng.choice(EOS) if rng.random() < eos_share else 10 + rng.randrange(5)
        return token, rng.randint(0, LEVELS) / LEVELS

    return propose


def decode(params: GenerationParams, prompt: list[int], loop: Loop) -> tuple[list[int], int]:
    """Return the answer and the number of steps of the decoder under test."""
    decoder = BlockDecoder(
        prompt_tokens=prompt, params=params, mask_id=MASK, eos_ids=EOS,
        prompt_attention="grid", native_block_size=loop.block_size,
    )  # fmt: skip
    cache: list[int] = []
    while window := decoder.next_window():
        decoder.apply(answer_of(window, cache, loop))
        cache += window.tokens[: window.num_to_cache]
    answer = list(decoder.answer_tokens[: decoder.num_useful_tokens])
    return answer, decoder.num_steps


def answer_of(window: Window, cache: list[int], loop: Loop) -> Proposals:
    canvas = (*cache, *window.tokens)
    tokens, confidence = [NO_TOKEN] * len(window.tokens), [0.0] * len(window.tokens)
    visible = window.visible_until()
    for row in window.asked(MASK):
        seen = canvas[: visible[row]]
        tokens[row], confidence[row] = loop.propose(seen, window.start + row)
    return Proposals(tokens, confidence)


CASES = st.tuples(
    st.sampled_from(["dynamic", "static", "masks", "linear", "sequential", "best and sure"]),
    st.integers(1, 9),  # block size
    st.integers(1, 9),  # steps
    st.integers(0, 12),  # prompt
    st.integers(1, 30),  # answer
    st.integers(1, LEVELS),  # threshold
    st.sampled_from([0.0, 0.02, 0.2]),
    st.integers(0, 2**32),
)


@given(case=CASES, whole=st.booleans())
@settings(max_examples=300)
def test_answers_and_steps_are_those_of_the_published_loops(
    case: tuple[str, int, int, int, int, int, float, int], whole: bool
) -> None:
    kind, size, num_steps, num_prompt, number, level, eos_share, seed = case
    num_steps, threshold = min(num_steps, size), level / LEVELS
    schedule = [*block_loops.even(size, num_steps), *[1] * size]
    rule: Rule
    params = GenerationParams(
        max_new_tokens=number,
        block_size=size,
        add_threshold=1.0,
        max_active_blocks=1,
        confidence_threshold=threshold,
        steps_per_block=num_steps,
        stop_at_eos="drain",
        tail="whole" if whole else "cut",
    )
    match kind:
        case "dynamic":
            rule = block_loops.dynamic(schedule, threshold)
        case "static":
            rule = block_loops.static(schedule)
            params = params.with_overrides({"confidence_threshold": 1.0})
        case "masks":  # zeros among the published shares are steps that are not taken
            rule = block_loops.static_by_masks(lambda masks: block_loops.even(masks, num_steps))
            params = params.with_overrides({"confidence_threshold": 1.0, "schedule": "masks"})
        case "linear":
            rule = block_loops.static_by_masks(lambda masks: block_loops.linear(masks, num_steps))
            params = params.with_overrides({"confidence_threshold": 1.0, "schedule": "linear"})
        case "sequential":
            rule = block_loops.sequential(schedule)
            params = params.with_overrides({"confidence_threshold": 1.0, "rank": "position"})
        case _:
            rule = block_loops.best_and_sure(threshold)
            below = threshold - 1 / (2 * LEVELS)
            params = params.with_overrides({"confidence_threshold": below, "steps_per_block": 0})
    prompt = [random.Random(seed).choice((1, 10, 11)) for _ in range(num_prompt)]
    loop = Loop(proposer(seed, eos_share), MASK, EOS, size)
    block_loops.block_loop(loop, prompt, number, rule, whole=whole)
    answer, steps = decode(params, prompt, loop)
    assert answer == loop.answer(num_prompt, number)
    assert steps == loop.num_forwards
    truncated, fewer = decode(params.with_overrides({"stop_at_eos": "truncate"}), prompt, loop)
    assert truncated == answer
    assert fewer <= steps


@given(st.integers(1, 64), st.integers(1, 64))
def test_linear_schedules_are_the_published_ones(num_masks: int, num_steps: int) -> None:
    found = shares("linear", num_steps, 64, num_masks)
    assert sum(found) == num_masks
    assert list(found) == block_loops.linear(num_masks, num_steps)


@pytest.mark.parametrize(
    ("num_masks", "num_steps", "wanted"),
    [
        (4, 3, (1, 1, 2)),  # a half in exact numbers, just below one in single precision
        (32, 10, (3, 3, 3, 3, 3, 3, 3, 4, 3, 4)),
        (32, 1024, (1,) * 32),
    ],
)
def test_single_precision_decides_linear_halves(
    num_masks: int, num_steps: int, wanted: tuple[int, ...]
) -> None:
    assert shares("linear", num_steps, 32, num_masks) == wanted


@given(st.integers(1, 64), st.integers(1, 100))
def test_even_schedules_are_the_published_ones(size: int, num_steps: int) -> None:
    found = shares("even", num_steps, size, 3)
    assert sum(found) == size
    assert list(found) == [n for n in block_loops.even(size, num_steps) if n]
    assert shares("masks", num_steps, 99, size) == found


def test_schedule_counts_what_the_prompt_left_of_the_block() -> None:
    params = GenerationParams(
        max_new_tokens=5, add_threshold=1.0, max_active_blocks=1, steps_per_block=2,
        confidence_threshold=1.0, schedule="linear",
    )  # fmt: skip
    loop = Loop(proposer(0, 0.0), MASK, EOS, 8)
    assert decode(params, [10, 10, 10], loop)[1] == 2  # 2 + 3 of the five masks
    _, steps = decode(params.with_overrides({"schedule": "even"}), [10, 10, 10], loop)
    assert steps == 2  # 4 of the eight positions, and the one that is left
    counts = [shares(schedule, 2, 4, 2) for schedule in ("even", "masks")]
    assert counts == [(2, 2), (1, 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps_per_block": -1}, "steps_per_block is -1 but must be an integer from 0"),
        ({"schedule": "cosine"}, "schedule is 'cosine' but must be one of even, masks, linear"),
        ({"tail": "open"}, "one of cut, drop, whole"),
        ({"rank": "length"}, "confidence, margin, neg_entropy, position"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidParams, match=message):
        GenerationParams().with_overrides(changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("attention", ["grid", "prompt_grid", "full"])
async def test_whole_last_blocks_have_room(attention: str) -> None:
    room = info(prompt_attention=attention, native_block_size=8, max_len=30)
    whole = GenerationParams(block_size=8, max_new_tokens=99, tail="whole", max_active_blocks=1)
    backend = ScriptedBackend("x" * 99, info=room)
    async with LocalEngine.over(backend, ByteCodec(), defaults=whole) as engine:
        longest = {"grid": 19, "prompt_grid": 24, "full": 24}[attention]  # 24 - 5, or three blocks
        result = await engine.generate("12345").result()
        assert result.usage.completion_tokens == longest
        assert backend.batches[-1][0].window.stop <= 30
        again = await engine.generate("12345", max_new_tokens=longest - 2).result()
        assert again.text == "x" * (longest - 2)
        with pytest.raises(PromptTooLong):
            await engine.generate("12345", max_new_tokens=longest + 1).result()
    check_clean(backend)
