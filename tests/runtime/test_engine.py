import asyncio
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import pytest

from d2f_runtime.backends.scripted import EOS_ID, MASK_ID, ByteCodec, ScriptedBackend, StepGate
from d2f_runtime.engine.local import Limits
from d2f_stream.core.errors import InvalidParams, InvalidPrompt, PromptTooLong
from d2f_stream.core.events import Block, Draft, Event, StreamFinished, StreamNames, StreamStarted
from d2f_stream.core.session import Prompt, Session
from fakes import ANSWER, engine_over, info, params, texts


async def every_event(session: Session) -> list[Event]:
    return [event async for event in session.events()]


async def test_blocks_concatenate_to_the_answer() -> None:
    async with engine_over(ScriptedBackend(ANSWER)) as engine:
        blocks = await texts(engine.generate("hi"))
    assert "".join(blocks) == ANSWER
    assert len(blocks) == -(-(len(ANSWER.encode()) + 1) // 8)


async def test_stream_starts_commits_and_finishes() -> None:
    async with engine_over(ScriptedBackend("twelve bytes")) as engine:
        events = await every_event(engine.generate("hi"))
    begin, first, second, end = events
    assert isinstance(begin, StreamStarted)
    assert (begin.model, begin.block_size, begin.prompt_tokens) == ("scripted", 8, 2)
    assert isinstance(first, Block)
    assert isinstance(second, Block)
    assert (first.start, first.stop, first.text) == (0, 8, "twelve b")
    assert (second.start, second.stop, second.text) == (8, 13, "ytes")
    assert second.token_ids[-1] == EOS_ID
    assert isinstance(end, StreamFinished)
    assert (end.reason, end.text_length) == ("eos", 12)
    assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (2, 13)
    assert end.usage.steps == second.steps
    assert end.timings.first_block_ms == first.elapsed_ms


async def test_events_carry_the_names_that_the_request_brings() -> None:
    names = StreamNames("stream-1", "request-1")
    gate = StepGate()
    async with engine_over(ScriptedBackend("twelve bytes", gate=gate)) as engine:
        session = engine.generate("hi", names=names, drafts=True)
        with pytest.raises(ValueError, match="another stream of this engine is called 'stream-1'"):
            engine.generate("hi", names=names)
        gate.open()
        first, *rest = await every_event(session)
    assert isinstance(first, StreamStarted)
    assert (first.stream, first.request_id) == names[:2]
    assert {event.stream for event in rest} == {"stream-1"}


async def test_answer_that_does_not_end_is_cut_at_max_new_tokens() -> None:
    async with engine_over(ScriptedBackend("abc" * 100)) as engine:
        result = await engine.generate("hi", max_new_tokens=20).result()
    assert (result.text, result.reason) == (("abc" * 7)[:20], "length")


async def test_default_length_yields_to_the_room_that_is_left() -> None:
    backend = ScriptedBackend("a" * 4096, info=info(max_len=100))
    async with engine_over(backend) as engine:
        assert engine.defaults.max_new_tokens == 128
        result = await engine.generate("x" * 90).result()
        assert (result.reason, len(result.text)) == ("length", 10)
        dropped = await engine.generate("x" * 90, tail="drop").result()
        assert len(dropped.text) == 8


@pytest.mark.parametrize("num_prompt_tokens", [100, 101])
async def test_prompt_that_leaves_no_room_is_refused(num_prompt_tokens: int) -> None:
    async with engine_over(ScriptedBackend("a", info=info(max_len=100))) as engine:
        with pytest.raises(PromptTooLong, match=r"holds 100 in all; shorten the prompt$"):
            engine.generate("x" * num_prompt_tokens)
        with pytest.raises(PromptTooLong, match="lower max_new_tokens to 4"):
            engine.generate("x" * 96, tail="drop")  # no whole block of 8 fits


async def test_room_is_the_engine_s_where_that_holds_less_than_the_model() -> None:
    backend = ScriptedBackend("a" * 4096)
    async with engine_over(backend, limits=Limits(max_tokens=64)) as engine:
        assert len((await engine.generate("x" * 60).result()).text) == 4


@pytest.mark.parametrize("how", ["override", "params"])
async def test_length_that_was_asked_for_must_fit(how: str) -> None:
    async with engine_over(ScriptedBackend("a", info=info(max_len=100))) as engine:
        ask = partial(engine.generate, "x" * 90)
        asked = params(max_new_tokens=11)
        with pytest.raises(PromptTooLong, match=r"tokens is 11.*lower max_new_tokens to 10"):
            ask(max_new_tokens=11) if how == "override" else ask(asked)


async def test_stop_string_ends_the_answer_before_it() -> None:
    async with engine_over(ScriptedBackend("one, two. Three, four.")) as engine:
        result = await engine.generate("hi", stop=(". Th",)).result()
    assert (result.text, result.reason) == ("one, two", "stop")


async def test_held_back_text_comes_with_the_last_block() -> None:
    async with engine_over(ScriptedBackend("1234567\nend")) as engine:
        blocks = await texts(engine.generate("hi", stop=("\nending",)))
    assert blocks == ["1234567", "\nend"]


@pytest.mark.parametrize(
    "prompt",
    ["user: hi\nassistant: ", [{"role": "user", "content": "hi"}], list(b"user: hi\nassistant: ")],
)
async def test_prompt_is_text_or_messages_or_ids(prompt: Prompt) -> None:
    backend = ScriptedBackend({"user: hi\nassistant: ": "hello"})
    async with engine_over(backend) as engine:
        assert (await engine.generate(prompt).result()).text == "hello"


async def test_drafts_show_what_is_filled() -> None:
    async with engine_over(ScriptedBackend("abcdefghijkl")) as engine:
        events = await every_event(engine.generate("hi", drafts=True, max_active_blocks=1))
    drafts = [event for event in events if isinstance(event, Draft)]
    filled = next(draft for draft in drafts if draft.text)
    assert filled.text == "abcd"
    assert filled.filled == (True,) * 4 + (False,) * 4
    assert filled.texts == ("a", "b", "c", "d", "", "", "", "")
    assert [getattr(event, "seq", None) for event in events if not isinstance(event, Draft)] == [
        *range(len(events) - len(drafts))
    ]


async def test_without_drafts_asked_for_there_are_none() -> None:
    async with engine_over(ScriptedBackend(ANSWER)) as engine:
        events = await every_event(engine.generate("hi"))
    assert not any(isinstance(event, Draft) for event in events)


async def test_sessions_share_a_step() -> None:
    backend = ScriptedBackend({f"prompt {i}": f"{i}" * (10 + i) for i in range(5)})
    async with engine_over(backend) as engine:
        sessions = [engine.generate(f"prompt {i}") for i in range(5)]
        results = await asyncio.gather(*(session.result() for session in sessions))
    assert [result.text for result in results] == [f"{i}" * (10 + i) for i in range(5)]
    assert max(len(batch) for batch in backend.batches) == 5


async def test_session_joins_between_two_steps() -> None:
    gate = StepGate()
    backend = ScriptedBackend("a" * 50, gate=gate)
    async with engine_over(backend) as engine:
        first = engine.generate("one")
        await asyncio.to_thread(gate.wait_entered)
        second = engine.generate("two")
        gate.open()
        await asyncio.gather(first.result(), second.result())
    assert [len(batch) for batch in backend.batches][:2] == [1, 2]


async def test_more_sessions_than_slots_take_turns() -> None:
    backend = ScriptedBackend("abcdefgh" * 3)
    async with engine_over(backend, limits=Limits(max_sessions=2)) as engine:
        sessions = [engine.generate("hi") for _ in range(7)]
        for session in sessions:
            assert (await session.result()).text == "abcdefgh" * 3
    assert max(len(batch) for batch in backend.batches) == 2


async def test_uniforms_are_the_same_alone_and_in_a_batch() -> None:
    def drawn(backend: ScriptedBackend) -> list[Sequence[float] | None]:
        rows = [row for batch in backend.batches for row in batch]
        return [row.uniforms for row in rows if row.slot == 0]

    asked = params(temperature=0.7, seed=11)
    alone, crowded = ScriptedBackend("a" * 30), ScriptedBackend("a" * 30)
    async with engine_over(alone) as engine:
        await engine.generate("hi", asked).result()
    async with engine_over(crowded) as engine:
        others = [asked.with_overrides({"seed": seed}) for seed in (12, 13)]
        sessions = [engine.generate("hi", each) for each in (asked, *others)]
        await asyncio.gather(*(session.result() for session in sessions))
    assert drawn(alone) == drawn(crowded)
    assert all(a != b for a, b in pairwise(drawn(alone)))


async def test_sampling_without_a_seed_draws_fresh_noise() -> None:
    backend = ScriptedBackend("abc")
    async with engine_over(backend) as engine:
        for _ in range(2):
            await engine.generate("hi", temperature=1.0).result()
    first, second = (batch[0].uniforms for batch in backend.batches)
    assert first != second


async def test_greedy_rows_carry_no_noise() -> None:
    backend = ScriptedBackend("abc")
    async with engine_over(backend) as engine:
        await engine.generate("hi", seed=3).result()
    assert backend.batches[0][0].uniforms is None


async def test_row_carries_the_request_s_sampling() -> None:
    backend = ScriptedBackend("abc")
    async with engine_over(backend) as engine:
        asked = params(temperature=0.5, top_p=0.9, rank="margin")
        await engine.generate("hi", asked).result()
    row = backend.batches[0][0]
    assert (row.temperature, row.top_p, row.rank) == (0.5, 0.9, "margin")


async def test_unread_session_is_paused_while_others_go_on_and_resumes_when_read() -> None:
    backend = ScriptedBackend("a" * 1000)
    async with engine_over(backend) as engine:
        unread = engine.generate("hi", max_new_tokens=512)
        await anext(unread)
        read = await engine.generate("hi", max_new_tokens=512).result()
        assert len(read.text) == 512
        assert len(unread.text) == 8 * 18  # one read, sixteen waiting, one above the mark
        assert len("".join(await texts(unread))) == 512 - 8


@pytest.mark.parametrize("prompt", ["", [], ()])
async def test_empty_prompt_is_invalid(prompt: Prompt) -> None:
    async with engine_over(ScriptedBackend()) as engine:
        with pytest.raises(InvalidPrompt, match="empty"):
            engine.generate(prompt)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (b"bytes", "the prompt is bytes but must be a string"),
        (7, "the prompt is int but must be"),
        ([1, 2, "3"], "prompt token 2 is '3', not an integer"),
        ([1, 2, 3.5], r"prompt token 2 is 3\.5, not an integer"),
        ([1, -2], "prompt token 1 is -2 but the ids of model scripted go from 0 to 256"),
        ([MASK_ID], "prompt token 0 is 257 but"),
        ([1, True], "prompt token 1 is True, not an integer"),
        ([10**30], "prompt token 0 is 10+ but the ids"),
        ("\ud83d", "half of a surrogate pair"),
        ([{"role": "user", "content": "\ud83d"}], "half of a surrogate pair"),
        ([{"role": "user", "content": 5}], "the content of chat message 0 is 5, no string"),
        ([{"role": "user"}], "chat message 0 is .* needs role and content"),
        ([{"role": "user", "content": "a"}, 5], "chat message 1 is 5"),
    ],
)
async def test_prompt_of_another_shape_is_invalid(prompt: Prompt, message: str) -> None:
    async with engine_over(ScriptedBackend()) as engine:
        with pytest.raises(InvalidPrompt, match=message):
            engine.generate(prompt)


async def test_prompt_too_long_names_all_three_numbers() -> None:
    backend = ScriptedBackend(info=info(max_len=50))
    async with engine_over(backend) as engine:
        with pytest.raises(PromptTooLong, match=r"10 tokens and max_new_tokens is 41, .* holds 50"):
            engine.generate("x" * 10, max_new_tokens=41)
        await engine.generate("x" * 10, max_new_tokens=40).result()


async def test_block_size_above_the_model_s_names_the_limit() -> None:
    async with engine_over(ScriptedBackend()) as engine:
        with pytest.raises(InvalidParams, match="block_size is 65 but must be at most 64"):
            engine.generate("hi", block_size=65)


async def test_invalid_override_names_the_field() -> None:
    async with engine_over(ScriptedBackend()) as engine:
        with pytest.raises(InvalidParams, match="temperature"):
            engine.generate("hi", temperature=-1.0)


async def test_overrides_change_params_which_replace_the_defaults() -> None:
    backend = ScriptedBackend("a" * 100)
    async with engine_over(backend) as engine:
        default = await engine.generate("hi", max_new_tokens=32).result()
        given = await engine.generate("hi", params(block_size=4), max_new_tokens=12).result()
    assert (len(default.text), len(given.text)) == (32, 12)
    assert engine.defaults == params()


async def test_grid_models_use_their_own_block_size() -> None:
    backend = ScriptedBackend(ANSWER, info=info(prompt_attention="grid", native_block_size=4))
    async with engine_over(backend) as engine:
        events = await every_event(engine.generate("hello"))
    assert isinstance(events[0], StreamStarted)
    assert events[0].block_size == 4
    blocks = [event for event in events if isinstance(event, Block)]
    assert [(block.start, block.stop) for block in blocks[:3]] == [(0, 3), (3, 7), (7, 11)]
    assert "".join(block.text for block in blocks) == ANSWER


async def test_draining_goes_on_after_the_answer_and_adds_nothing() -> None:
    def confidence(position: int, step: int) -> float:
        return 1.0 if position < 12 or step > 6 else 0.0

    backend = ScriptedBackend("abcdefgh", confidence=confidence)
    async with engine_over(backend) as engine:
        drained = await engine.generate("hi", stop_at_eos="drain", max_active_blocks=4).result()
    assert (drained.text, drained.reason) == ("abcdefgh", "eos")
    assert drained.token_ids == (*b"abcdefgh", EOS_ID)


async def test_info_needs_a_loaded_model() -> None:
    from d2f_runtime.engine.local import LocalEngine

    engine = LocalEngine.over(ScriptedBackend(), ByteCodec())
    with pytest.raises(RuntimeError, match="async with"):
        _ = engine.info
    async with engine:
        assert engine.info.name == "scripted"


async def test_first_draft_of_a_block_shows_it_all_masked_before_its_first_step() -> None:
    backend = ScriptedBackend("seven and eight", tokens_per_step=3)
    async with engine_over(backend) as engine:
        session = engine.generate("?", drafts=True)
        drafts = [event async for event in session.events() if isinstance(event, Draft)]
    for index in {draft.index for draft in drafts}:
        first = next(draft for draft in drafts if draft.index == index)
        assert not any(first.filled)
        assert first.text == ""
