"""OpenAI's Responses API, by its own client."""

from typing import Any

import openai
import pytest

from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_stream.server.openai.responses import RESPONSES
from openai_serving import serving

TEXT = "Six and two make eight."


async def test_response_comes_whole() -> None:
    async with serving(ScriptedBackend(TEXT)) as server:
        found = await server.openai().responses.create(
            model="d2f", input="How many?", instructions="Be brief.", max_output_tokens=64
        )
    assert found.output_text == TEXT
    assert (found.status, found.instructions) == ("completed", "Be brief.")
    assert found.usage is not None
    assert found.usage.output_tokens == len(TEXT) + 1
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens


async def test_response_that_is_cut_is_incomplete() -> None:
    async with serving(ScriptedBackend(TEXT)) as server:
        found = await server.openai().responses.create(
            model="d2f", input="How many?", max_output_tokens=3
        )
    assert (found.status, found.output_text) == ("incomplete", TEXT[:3])
    assert found.incomplete_details is not None
    assert found.incomplete_details.reason == "max_output_tokens"


async def test_streamed_response_is_the_whole_one_in_order() -> None:
    async with (
        serving(ScriptedBackend(TEXT)) as server,
        server.openai().responses.stream(
            model="d2f", input=[{"role": "user", "content": "How many?"}]
        ) as stream,
    ):
        events = [event async for event in stream]
        final = await stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == final.output_text == TEXT
    numbers = [event.sequence_number for event in events]
    assert numbers == sorted(set(numbers))


async def test_logprobs_are_told_of_the_text_s_tokens_whole_and_streamed() -> None:
    include: Any = ["message.output_text.logprobs"]
    async with serving(ScriptedBackend(TEXT)) as server:
        client = server.openai()
        whole = await client.responses.create(model="d2f", input="How many?", include=include)
        async with client.responses.stream(
            model="d2f", input="How many?", include=include
        ) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_response()
        plain = await client.responses.create(model="d2f", input="How many?")
    told = [
        token.token
        for event in events
        if event.type == "response.output_text.delta"
        for token in event.logprobs
    ]
    assert "".join(told) == TEXT
    for found in (whole, final):
        tokens = logprobs_of(found)
        assert "".join(token.token for token in tokens) == TEXT
        assert all(token.logprob <= 0 and token.top_logprobs == [] for token in tokens)
    assert logprobs_of(plain) == []


def logprobs_of(response: Any) -> list[Any]:
    [item] = response.output
    return list(item.content[0].logprobs)


async def test_turns_so_far_are_read() -> None:
    answers = {"user: One?\nassistant: A.\nuser: Two?\nassistant: ": "B."}
    async with serving(ScriptedBackend(answers)) as server:
        first: Any = {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "A.", "annotations": []}],
        }
        found = await server.openai().responses.create(
            model="d2f",
            input=[
                {"role": "user", "content": [{"type": "input_text", "text": "One?"}]},
                first,
                {"role": "user", "content": "Two?"},
            ],
        )
    assert found.output_text == "B."


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"text": {"format": {"type": "json_object"}}}, "text"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": "2"}]}, "input[0]"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
        ),
        ({"temperature": -1}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
async def test_what_is_not_done_is_refused_by_name(change: dict[str, Any], param: str) -> None:
    async with serving(ScriptedBackend(TEXT)) as server:
        body = {"model": "d2f", "input": "How many?", **change}
        with pytest.raises(openai.BadRequestError) as caught:
            await server.openai().post("/responses", cast_to=dict, body=body)
    assert caught.value.param is not None
    assert caught.value.param.startswith(param)


def test_every_field_of_the_client_is_known() -> None:
    from openai.types.responses import response_create_params as params

    fields = set(params.ResponseCreateParamsBase.__annotations__) | {"stream"}
    assert fields <= set(RESPONSES)


async def test_messages_are_taken_for_input() -> None:
    backend = ScriptedBackend({"user: hi\nassistant: ": "hello"})
    async with serving(backend) as served, served.http() as http:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
        answer = (await http.post("/v1/responses", json=body)).json()
        both = await http.post("/v1/responses", json={**body, "input": "hi"})
    assert answer["output"][0]["content"][0]["text"] == "hello"
    assert (both.status_code, both.json()["error"]["param"]) == (400, "messages")
