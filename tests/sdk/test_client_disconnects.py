"""Whatever the network does, every answer arrives whole and once, and is computed once."""

import asyncio
import random
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_stream.client.remote_engine import RemoteEngine
from d2f_stream.core.events import Block, Draft, Event, StreamFinished, StreamStarted
from d2f_stream.wire.codec import JSON, MSGPACK, Codec
from memory_network import Network, client_of, instantly, network


async def read(engine: RemoteEngine, prompt: str, *, drafts: bool = False) -> list[Event]:
    session = engine.generate(prompt, max_new_tokens=4000, drafts=drafts)
    return [event async for event in session.events()]


def check_whole(events: Sequence[Event], answer: str) -> None:
    durable = [event for event in events if not isinstance(event, Draft)]
    assert [event.seq for event in durable] == list(range(len(durable)))
    assert isinstance(durable[0], StreamStarted)
    assert isinstance(durable[-1], StreamFinished)
    assert "".join(event.text for event in durable if isinstance(event, Block)) == answer
    final = set()
    for event in events:
        if isinstance(event, Block):
            final.add(event.index)
        elif isinstance(event, Draft):
            assert event.index not in final


def answers_of(lengths: Sequence[int]) -> dict[str, str]:
    return {f"prompt {i}": f"{i}äö" * length for i, length in enumerate(lengths)}


def check_computed_once(net: Network, num_requests: int) -> None:
    assert len(net.notes.started) == num_requests
    assert set(net.notes.started.values()) == {1}


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    cuts=st.lists(st.integers(1, 12), max_size=30),
    capacity=st.integers(1, 5),
    drafts=st.booleans(),
    entered=st.booleans(),
    codec=st.sampled_from([JSON, MSGPACK]),
)
def test_severed_connections_lose_and_double_nothing(
    lengths: list[int],
    cuts: list[int],
    capacity: int,
    drafts: bool,
    entered: bool,
    codec: Codec,
) -> None:
    answers = answers_of(lengths)

    async def run() -> None:
        async with network(
            ScriptedBackend(answers), cuts=iter(cuts), capacity=capacity, codec=codec
        ) as net:
            engine = client_of(net, backoff=instantly(chance=0.0))
            if entered:
                await engine.__aenter__()
            logs = await asyncio.gather(*(read(engine, p, drafts=drafts) for p in answers))
            for log, answer in zip(logs, answers.values(), strict=True):
                check_whole(log, answer)
            check_computed_once(net, len(answers))
            await engine.close()

    asyncio.run(run())


def test_a_thousand_disconnects_at_random_moments() -> None:
    chance = random.Random(20)
    answers = answers_of([250] * 4)
    cuts = iter(lambda: chance.randint(1, 60), 0)

    async def run() -> None:
        async with network(ScriptedBackend(answers), cuts=cuts, capacity=3) as net:
            num_requests = 0
            while net.num_cut < 1000:
                engine = client_of(net, backoff=instantly(chance=0.0))
                logs = await asyncio.gather(*(read(engine, prompt) for prompt in answers))
                await engine.close()
                num_requests += len(answers)
                for log, answer in zip(logs, answers.values(), strict=True):
                    check_whole(log, answer)
                check_computed_once(net, num_requests)

    asyncio.run(run())


@settings(max_examples=25)
@given(
    moments=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    cuts=st.lists(st.integers(1, 12), max_size=20),
    ways=st.lists(st.sampled_from(["cancel", "drop", "leave", "none"]), min_size=6, max_size=6),
)
def test_given_up_amid_disconnects_ends_everywhere(
    moments: list[int], cuts: list[int], ways: list[str]
) -> None:
    """Each session is given up after so many turns of the loop, in one of the ways there are."""
    answer = "long " * 100

    async def use(engine: RemoteEngine, moment: int, way: str) -> None:
        session = engine.generate("hi", max_new_tokens=4000)
        if way == "none":
            assert (await session.result()).text == answer
            return
        for _ in range(moment):
            await asyncio.sleep(0)
        if way == "drop":
            return
        if way == "leave":
            async with session:
                pass
        session.cancel()
        result = await session.result()
        assert result.reason in ("cancelled", "eos")
        assert answer.startswith(result.text)

    async def run() -> None:
        async with network(ScriptedBackend(answer), cuts=iter(cuts)) as net:
            async with client_of(net, backoff=instantly(chance=0.0)) as engine:
                uses = [use(engine, m, way) for m, way in zip(moments, ways, strict=False)]
                await asyncio.gather(*uses)
            assert all(number == 1 for number in net.notes.started.values())

    asyncio.run(run())
