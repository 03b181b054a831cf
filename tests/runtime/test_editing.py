"""Editing of tokens that are set: LLaDA2.1's published loop, and what is final all the same."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import block_loops
from block_loops import Loop
from d2f_runtime.backends.base import StepRow
from d2f_runtime.backends.scripted import EOS_ID, MASK_ID, ByteCodec, ScriptedBackend
from d2f_runtime.decoding.decoder import Accepted, BlockDecoder, Committed, Edited
from d2f_runtime.decoding.window import NO_TOKEN, Proposals, Window
from d2f_runtime.engine.local import LocalEngine
from d2f_stream.core.errors import InvalidParams
from d2f_stream.core.events import Block, Draft, Event
from d2f_stream.core.params import GenerationParams
from fakes import check_clean, info

MASK, EOS, LEVELS = 99, (1, 2), 8


def proposer(seed: int, eos_share: float) -> block_loops.Propose:
    """Return a model that answers by what it sees, so that an edit changes later answers."""

    def propose(visible: tuple[int, ...], position: int) -> tuple[int, float]:
        rng = random.Random(hash((seed, visible, position)))
        token = rng.choice(EOS) if rng.random() < eos_share else 10 + rng.randrange(2)
        return token, rng.randint(0, LEVELS) / LEVELS

    return propose


def params_of(size: int, number: int, level: int, edit_level: int, most: int) -> GenerationParams:
    return GenerationParams(
        max_new_tokens=number,
        block_size=size,
        add_threshold=1.0,
        max_active_blocks=1,
        confidence_threshold=level / LEVELS,
        edit_threshold=edit_level / LEVELS,
        max_edit_steps=most,
        tail="whole",
    )


@dataclass
class Run:
    """What a decoder did, checked as it went."""

    answer: list[int]
    num_steps: int
    num_edits: int


def run(params: GenerationParams, prompt: Sequence[int], propose: block_loops.Propose) -> Run:
    decoder = BlockDecoder(
        prompt_tokens=prompt, params=params, mask_id=MASK, eos_ids=EOS,
        prompt_attention="grid", native_block_size=params.block_size,
    )  # fmt: skip
    cache: list[int] = []
    canvas: dict[int, int] = {}
    final: list[int] = []
    num_edits = 0
    while window := decoder.next_window():
        events = decoder.apply(answer_of(window, cache, propose))
        cache += window.tokens[: window.num_to_cache]
        assert list(prompt) == cache[: len(prompt)] or len(cache) < len(prompt)
        assert cache[len(prompt) :] == final[: len(cache) - len(prompt)], "final tokens are cached"
        for event in events:
            match event:
                case Accepted(position, token):
                    assert position not in canvas
                    canvas[position] = token
                case Edited(position, token):
                    assert position >= len(final), "nothing changes that was announced"
                    assert canvas[position] != token != MASK
                    canvas[position] = token
                    num_edits += 1
                case Committed(_, start, stop, tokens):
                    assert start == len(final)
                    assert list(tokens) == [canvas[position] for position in range(start, stop)]
                    final += tokens
    assert len(final) == decoder.num_useful_tokens
    return Run(final, decoder.num_steps, num_edits)


def answer_of(window: Window, cache: list[int], propose: block_loops.Propose) -> Proposals:
    canvas = (*cache, *window.tokens)
    tokens, confidence = [NO_TOKEN] * len(window.tokens), [0.0] * len(window.tokens)
    visible = window.visible_until()
    for row in window.asked(MASK):
        tokens[row], confidence[row] = propose(canvas[: visible[row]], window.start + row)
    return Proposals(tokens, confidence)


@given(
    size=st.integers(1, 8),
    num_prompt=st.integers(0, 12),
    number=st.integers(1, 24),
    level=st.integers(1, LEVELS),
    edit_level=st.integers(0, LEVELS),
    most=st.integers(0, 6),
    eos_share=st.sampled_from([0.0, 0.03, 0.3]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=400)
def test_answers_and_steps_are_those_of_the_published_loop(
    size: int,
    num_prompt: int,
    number: int,
    level: int,
    edit_level: int,
    most: int,
    eos_share: float,
    seed: int,
) -> None:
    prompt = [random.Random(seed).choice((1, 10, 11)) for _ in range(num_prompt)]
    propose = proposer(seed, eos_share)
    loop = Loop(propose, MASK, EOS, size)
    block_loops.joint_threshold(
        loop,
        prompt,
        number,
        threshold=level / LEVELS,
        editing_threshold=edit_level / LEVELS,
        max_post_steps=most,
        stops_early=True,
    )
    found = run(params_of(size, number, level, edit_level, most), prompt, propose)
    assert found.answer == loop.answer(num_prompt, number)
    assert found.num_steps == loop.num_forwards


def test_the_cases_edit_and_take_an_eos_back() -> None:
    edits, gone = 0, 0
    for seed in range(60):
        params, propose = params_of(6, 18, 4, 3, 6), proposer(seed, 0.2)
        seen: list[int] = []

        def watched(
            visible: tuple[int, ...],
            position: int,
            propose: block_loops.Propose = propose,
            seen: list[int] = seen,
        ) -> tuple[int, float]:
            seen.extend(at for at, token in enumerate(visible) if token in EOS)
            return propose(visible, position)

        found = run(params, [10, 10], watched)
        edits += found.num_edits
        ends = [2 + at for at, token in enumerate(found.answer) if token in EOS]
        gone += bool(set(seen) - {*ends, *range(2 + len(found.answer), 99)})
    assert edits > 100
    assert gone > 5


class Wavering(ScriptedBackend):
    """A scripted model that says something else of a position, the first times it is asked."""

    def _propose(self, row: StepRow) -> Proposals:
        proposals = super()._propose(row)
        tokens, state = list(proposals.tokens), self.open_slots[row.slot]
        for at in row.window.asked(MASK_ID):
            if (row.window.start + at) % 3 > state.num_steps % 4:
                tokens[at] = EOS_ID if (row.window.start + at) % 7 == 0 else ord("#")
        return Proposals(tokens, proposals.confidence, proposals.rank)


TEXTS = st.text("abc .é漢🙂", min_size=1, max_size=40)


@given(
    texts=st.lists(TEXTS, min_size=1, max_size=3),
    size=st.sampled_from([1, 4, 7]),
    most=st.integers(0, 20),
    drafts=st.booleans(),
)
@settings(max_examples=60)
def test_what_is_announced_is_final(texts: list[str], size: int, most: int, drafts: bool) -> None:
    answers = {f"prompt {i}": text for i, text in enumerate(texts)}
    backend = Wavering(
        answers,
        info=info(prompt_attention="grid", native_block_size=size),
        confidence=lambda position, step: ((position * 31 + step * 17) % 8) / 8,
    )
    params = params_of(size, 60, 6, 2, most).with_overrides({"drafts": drafts})

    async def answer() -> list[list[Event]]:
        async def read(number: int) -> list[Event]:
            session = engine.generate(f"prompt {number}", params)
            return [event async for event in session.events()]

        async with LocalEngine.over(backend, ByteCodec()) as engine:
            return await asyncio.gather(*map(read, range(len(texts))))

    for events in asyncio.run(answer()):
        durable = [event for event in events if not isinstance(event, Draft)]
        blocks = [event for event in durable if isinstance(event, Block)]
        assert [event.seq for event in durable] == list(range(len(durable)))
        assert [block.start for block in blocks] == [0, *(block.stop for block in blocks)][:-1]
        tokens = [token for block in blocks for token in block.token_ids]
        text = "".join(block.text for block in blocks)
        assert text == bytes(t for t in tokens if t < 256).decode(errors="replace")
        assert EOS_ID not in tokens[:-1]
        assert drafts or len(durable) == len(events)
    check_clean(backend)


async def test_drafts_show_the_edits() -> None:
    backend = Wavering(
        "abcdef", info=info(prompt_attention="grid", native_block_size=8), tokens_per_step=8
    )
    params = params_of(8, 8, 6, 0, 16).with_overrides({"drafts": True})
    async with LocalEngine.over(backend, ByteCodec()) as engine:
        events = [e async for e in engine.generate("prompt 1", params).events()]
    drafts = [event.text for event in events if isinstance(event, Draft)]
    blocks = [event.text for event in events if isinstance(event, Block)]
    assert any("#" in text for text in drafts)
    assert "".join(blocks) == "abcdef"


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({"max_active_blocks": 2}, "max_active_blocks is 1"),
        ({"sub_block_size": 2}, "sub_block_size is 0"),
        ({"attention": "full"}, "attention is 'blocks'"),
    ],
)
def test_what_editing_does_not_go_with_is_refused(changes: dict[str, object], needed: str) -> None:
    params = params_of(4, 8, 4, 4, 4).with_overrides(changes)  # type: ignore[arg-type]
    with pytest.raises(InvalidParams, match=f"must be None unless {needed}"):
        BlockDecoder(prompt_tokens=[1], params=params, mask_id=MASK, eos_ids=EOS)
    with pytest.raises(InvalidParams, match="from its own row"):
        BlockDecoder(
            prompt_tokens=[1],
            params=params_of(4, 8, 4, 4, 4),
            mask_id=MASK,
            eos_ids=EOS,
            shift_logits=True,
        )


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "x"])
def test_thresholds_out_of_range_are_named(value: object) -> None:
    with pytest.raises(InvalidParams, match=r"edit_threshold is .* must be None, or from 0 to 1"):
        GenerationParams().with_overrides({"edit_threshold": value})  # type: ignore[typeddict-item]
