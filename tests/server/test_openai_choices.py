"""Several choices of one request, and the log-probabilities of their tokens."""

import asyncio
import math
from typing import Any

import openai
import pytest

from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_stream.server.limits import ServeLimits
from fakes import ANSWER
from openai_serving import chat, serving

MESSAGES: Any = [{"role": "user", "content": "hi"}]
PROMPT = "user: hi\nassistant: "


def probability(position: int, step: int) -> float:
    """What ScriptedBackend claims of a token, whatever it is."""
    return 1 / (position + 2)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", [None, "t"], ids=["to the end", "to a stop string"])
async def test_logprobs_are_those_of_the_committed_tokens(stream: bool, stop: str | None) -> None:
    backend = ScriptedBackend("smile \U0001f600 ok, then", confidence=probability)
    text = "smile \U0001f600 ok, then".partition(stop or "!")[0]
    async with serving(backend) as served:
        create = served.openai().chat.completions.create
        asked: Any = {"model": "d2f", "messages": MESSAGES, "logprobs": True, "stop": stop}
        asked["top_logprobs"] = 0
        if stream:
            parts = [
                choice.logprobs
                async for chunk in await create(**asked, stream=True)
                for choice in chunk.choices
                if choice.logprobs
            ]
            assert len(parts) > 1
        else:
            answer = await create(**asked)
            parts = [answer.choices[0].logprobs]
            plain = await create(model="d2f", messages=MESSAGES)
            assert plain.choices[0].logprobs is None
    tokens = [token for part in parts for token in part.content]
    assert "".join(token.token for token in tokens) == text
    assert b"".join(bytes(token.bytes) for token in tokens) == text.encode()
    assert len(tokens) == len(text.encode())
    expected = [math.log(1 / (at + 2)) for at in range(len(tokens))]
    assert [token.logprob for token in tokens] == expected
    assert all(token.top_logprobs == [] for token in tokens)


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_of_a_completion_have_their_offsets(stream: bool) -> None:
    backend = ScriptedBackend(ANSWER, confidence=probability)
    async with serving(backend) as served:
        create = served.openai().completions.create
        if stream:
            chunks = [
                c async for c in await create(model="d2f", prompt="?", logprobs=0, stream=True)
            ]
            parts: list[Any] = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
        else:
            parts = [(await create(model="d2f", prompt="?", logprobs=0)).choices[0].logprobs]
    tokens = [token for part in parts for token in part.tokens]
    offsets = [offset for part in parts for offset in part.text_offset]
    values = [value for part in parts for value in part.token_logprobs]
    assert "".join(tokens) == ANSWER
    assert all(ANSWER[at:].startswith(token) for at, token in zip(offsets, tokens, strict=True))
    assert len(values) == len(tokens)


async def test_logprobs_and_replacing_deltas_do_not_go_together() -> None:
    async with serving(ScriptedBackend()) as served, served.http() as http:
        answer = await http.post(
            "/v1/chat/completions", json=chat(stream=True, diffusing=True, logprobs=True)
        )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logprobs")


@pytest.mark.parametrize("stream", [False, True])
async def test_several_choices_are_told_apart_by_their_index(stream: bool) -> None:
    backend = ScriptedBackend(ANSWER)
    async with serving(backend) as served:
        create = served.openai().chat.completions.create
        asked: Any = {"model": "d2f", "messages": MESSAGES, "n": 3, "temperature": 1.0, "seed": 5}
        texts = {0: "", 1: "", 2: ""}
        reasons: dict[int, str | None] = {}
        if stream:
            chunks = [
                chunk
                async for chunk in await create(
                    **asked, stream=True, stream_options={"include_usage": True}
                )
            ]
            for chunk in chunks[:-1]:
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
                    reasons[choice.index] = choice.finish_reason
            assert len({chunk.id for chunk in chunks}) == 1
            usage = chunks[-1].usage
        else:
            answer = await create(**asked)
            assert [choice.index for choice in answer.choices] == [0, 1, 2]
            for choice in answer.choices:
                texts[choice.index] = choice.message.content or ""
                reasons[choice.index] = choice.finish_reason
            usage = answer.usage
    assert texts == dict.fromkeys(range(3), ANSWER)
    assert reasons == dict.fromkeys(range(3), "stop")
    assert (usage.prompt_tokens, usage.completion_tokens) == (
        len(PROMPT),
        3 * (len(ANSWER.encode()) + 1),
    )
    first = [row.uniforms for batch in backend.batches for row in batch if row.window.start == 0]
    assert len({tuple(uniforms or ()) for uniforms in first}) == len(first) == 3


async def test_choices_that_there_is_no_room_for_start_none() -> None:
    async with serving(ScriptedBackend(ANSWER), limits=ServeLimits(max_streams=2)) as served:
        with pytest.raises(openai.RateLimitError, match="the limit is 2"):
            await served.openai().chat.completions.create(model="d2f", messages=MESSAGES, n=3)
        for _ in range(20):
            await asyncio.sleep(0)
        assert served.registry.num_active == 0


@pytest.mark.parametrize("n", [0, -1, 17])
async def test_number_of_choices_has_a_limit(n: int) -> None:
    async with serving(ScriptedBackend()) as served, served.http() as http:
        answer = await http.post("/v1/chat/completions", json=chat(n=n))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "n")
    assert error["message"] == f"n is {n} but must be an integer from 1 to 16"
