"""Answers that one engine began and another goes on with: the events are those of one engine."""

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import d2f_stream
from d2f_runtime.backends.base import StepRow
from d2f_runtime.backends.scripted import EOS_ID, MASK_ID, ByteCodec, ScriptedBackend, StepGate
from d2f_runtime.decoding.window import Proposals
from d2f_runtime.engine.local import LocalEngine
from d2f_runtime.engine.opening import open_engine
from d2f_stream.core.errors import InvalidRequest
from d2f_stream.core.events import Block, Event, StreamFinished, StreamNames, StreamStarted, Timings
from d2f_stream.core.params import GenerationParams
from fakes import ANSWER, engine_over, info, params
from installed_model import CHATS

ALPHABET = "abc .\n\t<é—漢🙂\u0301"
NAMES = StreamNames("stream", "request")
PROMPTS = st.text(ALPHABET, min_size=1, max_size=20)
FAMILIES: dict[str, dict[str, Any]] = {
    "llada": {},
    "dream": {"shift_logits": True},
    "ar": {"shift_logits": True, "prompt_attention": "causal"},
    "sdar": {"prompt_attention": "grid", "native_block_size": 4},
    "llada2": {"prompt_attention": "grid", "native_block_size": 16},
    "fast_dllm": {"prompt_attention": "prompt_grid", "native_block_size": 8, "shift_logits": True},
    "int8": {"window_scaled": True},
    "int8 dream": {"window_scaled": True, "shift_logits": True},
    "int8 sdar": {"window_scaled": True, "prompt_attention": "grid", "native_block_size": 4},
    "two ends": {"eos_ids": (EOS_ID, 10)},
    "a2d": {"shift_logits": True, "prompt_attention": "causal", "commit_attention": "causal"},
}
VERIFIED: dict[str, dict[str, Any]] = {
    "a2d": FAMILIES["a2d"],
    "branches": {**FAMILIES["a2d"], "branches": True, "spare_rows": 1000},
    "in place": {**FAMILIES["a2d"], "drafts_in_place": True, "spare_rows": 1000},
}
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=6), max_size=3).map(tuple)
PARAMS = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(1, 70),
        "block_size": st.sampled_from([1, 2, 5, 8, 16]),
        "activate_threshold": st.sampled_from([0.1, 0.95]),
        "temperature": st.sampled_from([0.0, 0.8]),
        "seed": st.integers(0, 9),
        "stop": STOPS,
        "logprobs": st.booleans(),
        "drafts": st.booleans(),
    }
)
PLAIN = st.fixed_dictionaries(
    {
        "max_active_blocks": st.sampled_from([1, 1, 2, None]),
        "add_threshold": st.sampled_from([0.1, 1.0]),
        "stop_at_eos": st.sampled_from(["truncate", "drain"]),
        "tail": st.sampled_from(["cut", "whole"]),
        "steps_per_block": st.sampled_from([0, 0, 3]),
        "sub_block_size": st.sampled_from([0, 0, 4]),
    }
)


class DrawnBackend(ScriptedBackend):
    """Proposes letters by the numbers that a sampled row is to draw, as models would."""

    def _propose(self, row: StepRow) -> Proposals:
        told = super()._propose(row)
        if row.uniforms is None:
            return told
        drawn = [
            97 + int(26 * number) if 0 <= token < EOS_ID else token
            for token, number in zip(told.tokens, row.uniforms, strict=True)
        ]
        return told._replace(tokens=drawn)


async def events_of(
    engine: LocalEngine, prompt: str, asked: GenerationParams, committed: Sequence[Block] = ()
) -> list[Event]:
    session = engine.generate(prompt, asked, names=NAMES, committed=committed)
    return [event async for event in session.events() if hasattr(event, "seq")]


def timeless(events: Sequence[Event], *, steps: bool) -> list[Event]:
    """Return events without the time that they took, and without steps and what depends on them."""
    found: list[Event] = []
    for event in events:
        if isinstance(event, Block):
            event = msgspec.structs.replace(event, elapsed_ms=0.0)
            if not steps:
                event = msgspec.structs.replace(event, steps=0, logprobs=())
        elif isinstance(event, StreamFinished):
            event = msgspec.structs.replace(event, timings=Timings(first_block_ms=0, total_ms=0))
            if not steps:
                usage = msgspec.structs.replace(event.usage, steps=0)
                event = msgspec.structs.replace(event, usage=usage)
        found.append(event)
    return found


def check_cuts(backend: ScriptedBackend, prompt: str, asked: GenerationParams) -> None:
    """Cut the answer behind each of its blocks; what follows must be what followed."""

    async def run() -> None:
        async with engine_over(backend) as engine:
            uncut = await events_of(engine, prompt, asked)
            blocks = [event for event in uncut if isinstance(event, Block)]
            # What stands in blocks that are not final is lost, and they take their steps again.
            exact = asked.max_active_blocks == 1 and asked.commit == "filled"
            whole = asked.stop_at_eos == "drain"  # which takes steps behind the end
            for number in range(1, len(blocks) + 1):
                rest = await events_of(engine, prompt, asked, blocks[:number])
                same = exact and not (whole and number == len(blocks))
                wanted = timeless(uncut[number + 1 :], steps=same)
                assert timeless(rest, steps=same) == wanted

    asyncio.run(run())


@settings(max_examples=120)
@given(
    prompt=PROMPTS,
    answer=st.text(ALPHABET, max_size=60),
    family=st.sampled_from(sorted(FAMILIES)),
    common=PARAMS,
    plain=PLAIN,
    tokens_per_step=st.integers(1, 9),
)
def test_a_cut_answer_goes_on_as_if_it_had_not_been_cut(
    prompt: str,
    answer: str,
    family: str,
    common: dict[str, Any],
    plain: dict[str, Any],
    tokens_per_step: int,
) -> None:
    asked = GenerationParams(**common, **plain)
    if asked.max_active_blocks != 1:  # what is drawn depends on the steps, which start again
        asked = asked.with_overrides({"temperature": 0.0})
    backend = DrawnBackend(answer, info=info(**FAMILIES[family]), tokens_per_step=tokens_per_step)
    check_cuts(backend, prompt, asked)


@settings(max_examples=60)
@given(
    prompt=PROMPTS,
    answer=st.text(ALPHABET, max_size=60),
    family=st.sampled_from(sorted(VERIFIED)),
    common=PARAMS,
    tokens_per_step=st.integers(1, 9),
)
def test_so_does_a_verified_one(
    prompt: str, answer: str, family: str, common: dict[str, Any], tokens_per_step: int
) -> None:
    asked = GenerationParams(**common, commit="verify")
    backend = DrawnBackend(answer, info=info(**VERIFIED[family]), tokens_per_step=tokens_per_step)
    check_cuts(backend, prompt, asked)


@pytest.mark.parametrize("changes", [{"attention": "full"}, {"edit_threshold": 0.5}])
def test_whole_canvases_and_edited_blocks_go_on_too(changes: dict[str, Any]) -> None:
    fields: Any = {"max_active_blocks": 1, "block_size": 8, **changes}
    grid = {"prompt_attention": "grid"} if "edit_threshold" in changes else {}
    backend = ScriptedBackend(ANSWER, info=info(**grid))
    check_cuts(backend, "prompt", GenerationParams(**fields))


@pytest.mark.parametrize("changes", [{}, {"temperature": 1.0, "seed": 3}])
async def test_the_embedded_model_goes_on_with_the_same_text(changes: Any) -> None:
    async with d2f_stream.load() as engine:
        asked = engine.defaults.with_overrides(changes)
        for prompt in engine.info.examples[:2]:
            await check_model(engine, prompt, asked)


@pytest.mark.skipif(not (CHATS / "manifest.json").is_file(), reason="no model is packaged")
@pytest.mark.usefixtures("one_core")
async def test_so_does_the_model_package() -> None:
    async with open_engine(CHATS) as engine:
        short = engine.defaults.with_overrides({"max_new_tokens": 12})
        for asked in (short, short.with_overrides({"temperature": 0.8, "seed": 3})):
            await check_model(engine, "The capital of France is", asked)


async def check_model(engine: d2f_stream.Engine, prompt: str, asked: GenerationParams) -> None:
    uncut = [block async for block in engine.generate(prompt, asked, names=NAMES)]
    assert len(uncut) > 2
    for number in range(1, len(uncut)):
        session = engine.generate(prompt, asked, names=NAMES, committed=uncut[:number])
        rest = [block async for block in session]
        same = asked.commit == "filled"
        assert timeless(rest, steps=same) == timeless(uncut[number:], steps=same)


async def test_it_takes_one_step_for_all_that_was_committed() -> None:
    backend = ScriptedBackend(ANSWER)
    asked = params(max_active_blocks=1)
    async with engine_over(backend) as engine:
        uncut = await events_of(engine, "prompt", asked)
        num_steps = backend.num_steps
        blocks = [event for event in uncut if isinstance(event, Block)]
        await events_of(engine, "prompt", asked, blocks[:-1])
        assert backend.num_steps - num_steps == blocks[-1].steps - blocks[-2].steps
        (first, *_) = (batch[0].window for batch in list(backend.batches)[num_steps:])
        assert first.num_to_cache == blocks[-2].stop + len(b"prompt") - first.start


async def test_where_all_of_a_window_sets_the_scale_each_block_is_cached_amid_what_it_was() -> None:
    backend = ScriptedBackend(ANSWER, info=info(window_scaled=True))
    asked = params(max_active_blocks=1)
    async with engine_over(backend) as engine:
        uncut = await events_of(engine, "prompt", asked)
        once = [batch[0].window for batch in backend.batches]
        blocks = [event for event in uncut if isinstance(event, Block)]
        await events_of(engine, "prompt", asked, blocks[:3])
        again = [batch[0].window for batch in list(backend.batches)[len(once) :]]
    caching = [window for window in once if window.num_to_cache]
    assert again[0].tokens == caching[0].tokens[again[0].start :]  # the prompt is kept
    assert again[1:4] == caching[1:4]
    assert again[4:] == once[once.index(caching[3]) + 1 :]


async def test_what_the_session_holds_is_the_whole_answer() -> None:
    async with engine_over(ScriptedBackend(ANSWER)) as engine:
        uncut = await engine.generate("prompt", params(), names=NAMES).result()
        blocks = [b async for b in engine.generate("prompt", params(), names=NAMES)]
        session = engine.generate("prompt", params(), names=NAMES, committed=blocks[:3])
        assert session.text == "".join(block.text for block in blocks[:3])
        rest = [block async for block in session]
        assert [block.index for block in rest] == [block.index for block in blocks[3:]]
        result = await session.result()
        assert (result.text, result.token_ids) == (uncut.text, uncut.token_ids)
        assert result.timings.first_block_ms == blocks[0].elapsed_ms
        assert result.timings.total_ms >= blocks[2].elapsed_ms


async def test_a_continued_answer_can_be_cancelled_and_ends_behind_what_was_told() -> None:
    gate = StepGate()
    backend = ScriptedBackend(ANSWER, gate=gate)
    async with engine_over(backend) as engine:
        gate.let_through(1000)
        blocks = [b async for b in engine.generate("prompt", params(), names=NAMES)]
    gate = StepGate()
    async with engine_over(ScriptedBackend(ANSWER, gate=gate)) as engine:
        session = engine.generate("prompt", params(), names=NAMES, committed=blocks[:2])
        await asyncio.to_thread(gate.wait_entered)
        session.cancel()
        gate.open()
        (end,) = [event async for event in session.events()]
        assert isinstance(end, StreamFinished)
        assert (end.seq, end.reason) == (3, "cancelled")
        assert end.text_length == len("".join(block.text for block in blocks[:2]))


async def test_before_the_model_is_loaded_it_ends_behind_what_was_told_too() -> None:
    async with engine_over(ScriptedBackend(ANSWER)) as engine:
        blocks = [b async for b in engine.generate("prompt", params(), names=NAMES)]
    engine = LocalEngine.over(ScriptedBackend(ANSWER), ByteCodec(), defaults=params())
    session = engine.generate("prompt", names=NAMES, committed=blocks[:2])
    session.cancel()
    async with engine:
        (end,) = [event async for event in session.events()]
    assert isinstance(end, StreamFinished)
    assert (end.seq, end.reason, end.usage.completion_tokens) == (3, "cancelled", 16)


async def test_capacity_and_waiting_are_those_of_the_whole_answer() -> None:
    backend = ScriptedBackend(ANSWER, capacity=100)
    async with engine_over(backend) as engine:
        asked = params(max_new_tokens=90)
        blocks = [b async for b in engine.generate("prompt", asked, names=NAMES)]
        sessions = [
            engine.generate(
                "prompt", asked, names=StreamNames(str(i), str(i)), committed=blocks[:2]
            )
            for i in range(3)
        ]
        texts = [(await session.result()).text for session in sessions]
        assert texts == ["".join(block.text for block in blocks)] * 3


def changed(blocks: Sequence[Block], number: int, **fields: Any) -> list[Block]:
    found = list(blocks)
    found[number] = msgspec.structs.replace(found[number], **fields)
    return found


async def test_what_no_engine_has_told_is_refused() -> None:
    async with engine_over(ScriptedBackend(ANSWER)) as engine:
        events = await events_of(engine, "prompt", params(max_new_tokens=40))
        blocks = [event for event in events if isinstance(event, Block)]
        assert isinstance(events[0], StreamStarted)
        ids = blocks[1].token_ids
        asked = params(max_new_tokens=40)
        cases = [
            (blocks[1:], asked, "seq 2 but must have 1"),
            (changed(blocks, 1, token_ids=(257, *ids[1:])), asked, "holds the id 257"),
            (changed(blocks, 1, token_ids=(-1, *ids[1:])), asked, "holds the id -1"),
            (changed(blocks, 1, token_ids=ids[1:]), asked, "7 tokens for 8 positions"),
            (changed(blocks, 1, start=9), asked, "positions 9:16, but this request's has index 1"),
            (changed(blocks, 1, index=2), asked, "has index 2"),
            (changed(blocks, 1, token_ids=(EOS_ID, *ids[1:])), asked, "behind the end"),
            (changed(blocks, 1, token_ids=(*ids[:-1], EOS_ID)), asked, "block 2 follows the end"),
            (changed(blocks, 1, text="other"), asked, "the text of committed block 1 is 'other'"),
            (blocks, params(max_new_tokens=32), "block 4 follows the end of the answer"),
            (blocks, params(block_size=4), "has index 0 and positions 0:8"),
            (blocks, params(max_new_tokens=30), "has index 3 and positions 24:32"),
            (blocks, params(stop=(ANSWER[3:6],)), "the stop strings that it began with"),
        ]
        for committed, wanted, sentence in cases:
            with pytest.raises(InvalidRequest, match=sentence):
                engine.generate("prompt", wanted, committed=committed)
        for value in (None, "abc", [1], iter(blocks)):
            with pytest.raises(InvalidRequest, match=r"committed is .* but must be a list"):
                engine.generate("prompt", committed=value)  # type: ignore[arg-type]
        assert MASK_ID == 257  # which the vocabulary ends before
