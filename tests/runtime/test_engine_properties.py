import asyncio
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_runtime.backends.scripted import EOS_ID, ByteCodec, ScriptedBackend
from d2f_runtime.engine.local import Limits, LocalEngine
from d2f_stream.core.events import Block, Draft, Event, StreamFinished, StreamStarted
from d2f_stream.core.params import GenerationParams
from d2f_stream.core.session import Result, Session
from fakes import check_clean, info

ALPHABET = "abc .\n\t<é—漢🙂\u0301"
TEXTS = st.text(ALPHABET, max_size=60)
REQUESTS = st.builds(
    GenerationParams,
    max_new_tokens=st.integers(1, 80),
    block_size=st.sampled_from([1, 2, 5, 8, 16]),
    add_threshold=st.sampled_from([0.1, 0.5, 1.0]),
    activate_threshold=st.sampled_from([0.1, 0.95, 1.0]),
    max_active_blocks=st.sampled_from([None, 1, 2, 4]),
    temperature=st.sampled_from([0.0, 0.8]),
    stop=st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3).map(tuple),
    stop_at_eos=st.sampled_from(["truncate", "drain"]),
    tail=st.sampled_from(["cut", "whole"]),
    drafts=st.booleans(),
)
GRIDS = st.sampled_from(["full", "causal", "grid"])


async def answer_all(
    engine: LocalEngine, requests: Sequence[tuple[str, GenerationParams]]
) -> list[tuple[list[Event], Result]]:
    async def read(session: Session) -> tuple[list[Event], Result]:
        return [event async for event in session.events()], await session.result()

    async with engine:
        sessions = [engine.generate(f"prompt {i}", each) for i, (_, each) in enumerate(requests)]
        return await asyncio.gather(*map(read, sessions))


def expected(answer: str, params: GenerationParams) -> str:
    tokens = answer.encode()[: params.max_new_tokens]
    text = tokens.decode(errors="replace")
    ends = [text.find(stop) for stop in params.stop if stop in text]
    return text[: min(ends)] if ends else text


def check_events(events: list[Event], result: Result, answer: str, asked: GenerationParams) -> None:
    durable = [event for event in events if not isinstance(event, Draft)]
    blocks = [event for event in durable if isinstance(event, Block)]
    assert [event.seq for event in durable] == list(range(len(durable)))
    assert isinstance(durable[0], StreamStarted)
    assert sum(isinstance(event, StreamFinished) for event in durable) == 1
    end = durable[-1]
    assert isinstance(end, StreamFinished)
    assert [block.index for block in blocks] == list(range(len(blocks)))
    assert [block.start for block in blocks] == [0, *(block.stop for block in blocks)][:-1]
    assert all(len(block.token_ids) == block.stop - block.start for block in blocks)
    assert result.text == "".join(block.text for block in blocks) == expected(answer, asked)
    assert end.text_length == len(result.text)
    assert result.token_ids == tuple(token for block in blocks for token in block.token_ids)
    assert end.usage.completion_tokens == len(result.token_ids)
    if end.reason != "stop":
        assert (end.reason == "eos") == (result.token_ids[-1] == EOS_ID)
    assert asked.drafts or len(durable) == len(events)


@settings(max_examples=150)
@given(
    requests=st.lists(st.tuples(TEXTS, REQUESTS), min_size=1, max_size=4),
    tokens_per_step=st.integers(1, 12),
    seed=st.integers(0, 1000),
    attention=GRIDS,
    max_rows=st.integers(1, 4),
    max_sessions=st.integers(1, 4),
    capacity=st.sampled_from([None, 88, 130, 200]),
)
def test_events_are_gapless_and_their_texts_are_the_answer(
    requests: list[tuple[str, GenerationParams]],
    tokens_per_step: int,
    seed: int,
    attention: str,
    max_rows: int,
    max_sessions: int,
    capacity: int | None,
) -> None:
    def confidence(position: int, step: int) -> float:
        return ((position * 7919 + step * 104729 + seed) % 16) / tokens_per_step / 4

    answers = {f"prompt {i}": answer for i, (answer, _) in enumerate(requests)}
    backend = ScriptedBackend(
        answers,
        info=info(prompt_attention=attention),
        tokens_per_step=tokens_per_step,
        confidence=confidence if seed % 2 else None,
        capacity=capacity,
    )
    limits = Limits(max_rows=max_rows, max_sessions=max_sessions)
    engine = LocalEngine.over(backend, ByteCodec(), limits=limits)
    outcomes = asyncio.run(answer_all(engine, requests))
    check_clean(backend)
    for (answer, asked), (events, result) in zip(requests, outcomes, strict=True):
        check_events(events, result, answer, asked)
