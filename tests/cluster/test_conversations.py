"""Which replica a conversation's turns go to, and what tells that they belong together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2f_runtime.backends.scripted import SCRIPTED_INFO, ScriptedBackend
from d2f_runtime.models.facts import PromptAttention
from d2f_stream.cluster.conversations import beginning_of, home_of, key_of
from d2f_stream.cluster.handle_engine import HandleEngine
from d2f_stream.core.events import StreamNames
from d2f_stream.core.session import Prompt
from fakes import ANSWER
from replicas import Replicas, replicas_over

keys = st.text(max_size=8)
names = st.lists(st.text(max_size=4), min_size=1, max_size=8, unique=True)
loads = st.dictionaries(st.text(max_size=4), st.integers(0, 64), min_size=1, max_size=8)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=8)}
)
QUESTION = {"role": "user", "content": "What is the capital of France?"}
TURNS = ({"role": "assistant", "content": "Paris."}, {"role": "user", "content": "Of Spain?"})


def idle(replicas: list[str]) -> str:
    """The home of a conversation where nothing else runs."""
    home = home_of("key", dict.fromkeys(replicas, 0))
    assert home is not None
    return home


@given(names, st.randoms())
def test_all_servers_find_the_same_home(replicas: list[str], random: Random) -> None:
    shuffled = list(replicas)
    random.shuffle(shuffled)
    assert idle(shuffled) == idle(replicas) in replicas


@given(names, st.text(max_size=4))
def test_replica_that_comes_or_goes_moves_only_what_it_gets_or_had(
    replicas: list[str], other: str
) -> None:
    fewer = [name for name in replicas if name != other]
    if fewer and len(fewer) < len(replicas):
        assert idle(fewer) == idle(replicas) or idle(replicas) == other
    assert idle([*fewer, other]) in (other, idle(fewer) if fewer else other)


@given(keys, loads)
def test_home_has_little_more_to_do_than_others(key: str, loads: dict[str, int]) -> None:
    home = home_of(key, loads)
    at_rest = home_of(key, dict.fromkeys(loads, 0))
    assert at_rest is not None
    limit = 5 * sum(loads.values()) + 4 * len(loads)  # 1.25 means and one, times 4 n
    assert home == (at_rest if 4 * len(loads) * loads[at_rest] <= limit else None)


@given(keys, names, st.integers(0, 64))
def test_even_load_lets_every_conversation_go_home(
    key: str, replicas: list[str], load: int
) -> None:
    assert home_of(key, dict.fromkeys(replicas, load)) is not None


def test_homes_are_spread_evenly() -> None:
    replicas = dict.fromkeys("abcd", 0)
    homes = [home_of(str(number), replicas) for number in range(4000)]
    for name in replicas:
        assert homes.count(name) == pytest.approx(1000, abs=150)  # five standard deviations


@given(st.lists(messages, max_size=6), st.lists(messages, max_size=6))
def test_turns_of_a_conversation_begin_alike(
    first: list[dict[str, str]], more: list[dict[str, str]]
) -> None:
    beginning = beginning_of(first, raw=False)
    assert bool(beginning) == any(message["role"] == "user" for message in first)
    if beginning:
        assert beginning_of([*first, *more], raw=False) == beginning
        turned = [dict(reversed(message.items())) for message in first]
        assert beginning_of(turned, raw=False) == beginning
        assert beginning_of([{"role": "system", "content": "Other."}, *first], raw=False) not in (
            beginning,
            "",
        )


def test_key_is_of_one_client_s_conversation_and_tells_nothing_of_it() -> None:
    beginning = beginning_of([QUESTION], raw=False)
    assert beginning == beginning_of(QUESTION["content"], raw=False)
    assert beginning != beginning_of("What is the capital of Spain?", raw=False)
    ann, bob = (key_of(beginning, scope=scope) for scope in ("ann", "bob"))
    assert len({ann, bob, beginning}) == 3
    assert len(bytes.fromhex(ann)) == 16
    assert key_of("", scope="ann") == ""
    for prompt in ([1, 2, 3], [], [TURNS[0]]):
        assert beginning_of(prompt, raw=False) == ""
    assert beginning_of("verbatim", raw=True) == ""


@asynccontextmanager
async def engine_over(
    *attentions: PromptAttention, errors: dict[int, Exception] | None = None
) -> AsyncIterator[tuple[Replicas, HandleEngine]]:
    backends = [
        ScriptedBackend(
            ANSWER, info=replace(SCRIPTED_INFO, prompt_attention=attention), errors=errors or {}
        )
        for attention in attentions
    ]
    async with replicas_over(*backends) as (calls, _), HandleEngine(calls) as engine:
        yield calls, engine


@pytest.mark.parametrize("attention", ["causal", "grid", "full", "prompt_grid"])
async def test_calls_carry_the_key_where_the_model_keeps_turns(attention: PromptAttention) -> None:
    async with engine_over(attention) as (calls, engine):

        async def ask(prompt: Prompt, *, scope: str = "ann") -> str:
            names = StreamNames("stream", "request", scope)
            await engine.generate(prompt, names=names, raw=False)
            return calls.conversations[-1]

        first = await ask("question")
        if attention in ("full", "prompt_grid"):
            assert first == ""
            return
        assert len(first) == 32
        assert await ask("question") == first
        assert await ask(await engine.encode("question", raw=False)) == first
        others = {await ask("question", scope="bob"), await ask("question?")}
        assert len(others | {first}) == 3
        assert await ask(await engine.encode("question", raw=True)) == ""
        assert await ask([1, 2, 3]) == ""


async def test_failed_replica_is_not_asked_again_as_the_home(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("d2f_stream.cluster.attempts.BACKOFF_S", (0.0,))
    errors: dict[int, Exception] = {2: RuntimeError("CUDA error")}
    attentions: list[PromptAttention] = ["causal"] * 6
    async with engine_over(*attentions, errors=errors) as (calls, engine):
        with pytest.raises(Exception, match="CUDA error"):
            await engine.generate("question", raw=False)
    first, *others = calls.conversations
    assert first
    assert others == [""] * 4
