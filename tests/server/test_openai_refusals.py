"""The OpenAI routes as its client calls them: what is refused, and how it is told."""

import json
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_stream.core.params import GenerationParams
from d2f_stream.server.auth import Auth
from d2f_stream.server.limits import ServeLimits
from openai_serving import MESSAGES, TOKEN, Serving, chat, serving

CONTEXT = "context_length_exceeded"
UNSUPPORTED_IN_BOTH = {
    "n": 17,
    "logit_bias": {"50256": -100},
    "presence_penalty": 0.5,
    "frequency_penalty": -1,
}


UNSUPPORTED_IN_CHAT: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "functions": [{"name": "f"}],
    "tool_choice": "required",
    "function_call": {"name": "f"},
    "top_logprobs": 3,
    "response_format": {"type": "json_object"},
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
}


UNSUPPORTED_IN_COMPLETIONS = {"best_of": 3, "echo": True, "suffix": "end", "logprobs": 3}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("name", "value"), (UNSUPPORTED_IN_BOTH | UNSUPPORTED_IN_CHAT).items())
async def test_unsupported_parameter_of_chat_is_refused(
    name: str, value: object, stream: bool
) -> None:
    async with serving(ScriptedBackend()) as served:
        with pytest.raises(openai.BadRequestError, match=name) as caught:
            await served.openai().chat.completions.create(
                model="d2f", messages=MESSAGES, stream=stream, extra_body={name: value}
            )
        assert served.registry.num_retained == 0
    assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("name", "value"), (UNSUPPORTED_IN_BOTH | UNSUPPORTED_IN_COMPLETIONS).items()
)
async def test_unsupported_parameter_of_completions_is_refused(name: str, value: object) -> None:
    async with serving(ScriptedBackend()) as served:
        with pytest.raises(openai.BadRequestError, match=name) as caught:
            await served.openai().completions.create(
                model="d2f", prompt="hi", extra_body={name: value}
            )
    assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    "neutral",
    [
        {"n": 1, "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0},
        {"tools": [], "functions": [], "tool_choice": "none", "function_call": "auto"},
        {"logprobs": False, "top_logprobs": 0, "response_format": {"type": "text"}},
        {"modalities": ["text"], "audio": None, "stop": [], "stream_options": None},
        {"user": "ann", "metadata": {"a": "b"}, "store": False, "reasoning_effort": "none"},
        {"d2f": None, "diffusing": False, "max_tokens": None, "parallel_tool_calls": True},
    ],
)
async def test_parameters_that_change_nothing_are_accepted(neutral: dict[str, Any]) -> None:
    async with serving(ScriptedBackend("fine")) as served, served.http() as http:
        answer = await http.post("/v1/chat/completions", json=chat(**neutral))
    assert answer.json()["choices"][0]["message"]["content"] == "fine"


async def test_several_prompts_are_refused() -> None:
    async with serving(ScriptedBackend()) as served:
        with pytest.raises(openai.BadRequestError, match="holds 2 prompts") as caught:
            await served.openai().completions.create(model="d2f", prompt=["one", "two"])
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": -1}, "temperature", "invalid_params"),
        ({"top_p": 2}, "top_p", "invalid_params"),
        ({"max_tokens": 0}, "max_tokens", "invalid_params"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "invalid_params"),
        ({"stop": ["a"] * 17}, "stop", "invalid_params"),
        ({"d2f": {"block_size": 0}}, "d2f.block_size", "invalid_params"),
        ({"d2f": {"block_sise": 8}}, "d2f", "invalid_request"),
        ({"messages": [{"role": "user", "content": "x" * 4090}]}, "messages", CONTEXT),
        ({"messages": [{"role": "user", "content": "x" * 40_000}]}, "messages", CONTEXT),
        ({"unheard_of": 1}, "unheard_of", "unsupported_parameter"),
        ({"top_k": True}, "top_k", "unsupported_parameter"),
        ({"stream_options": {"x\n": 1}}, r"stream_options.x\x0a", "unsupported_parameter"),
        ({"d2f": {"max_active_blocks": 0}}, "d2f.max_active_blocks", "invalid_params"),
        ({"messages": []}, "messages", "invalid_prompt"),
        ({"messages": "hi"}, "messages", "invalid_request"),
        ({"temperature": "hot"}, "temperature", "invalid_request"),
        ({"seed": 2**64}, "seed", "invalid_params"),
        ({"max_tokens": -(2**70)}, "max_tokens", "invalid_params"),
        ({"messages": [{"content": "hi"}]}, "messages[0]", "invalid_request"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_invalid_values_are_refused_by_name(
    fields: dict[str, Any], param: str, code: str, stream: bool
) -> None:
    async with serving(ScriptedBackend()) as served, served.http() as http:
        answer = await http.post("/v1/chat/completions", json=chat(stream=stream) | fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] == "invalid_request_error"
    assert error["message"]


async def test_too_long_a_prompt_is_told_in_words_that_clients_act_on() -> None:
    async with serving(ScriptedBackend()) as served, served.http() as http:
        body = chat("x" * 4096, max_tokens=16)
        error = (await http.post("/v1/chat/completions", json=body)).json()["error"]
        limited = (await http.post("/v1/completions", json={"prompt": "x" * 4096})).json()["error"]
    assert error["message"].startswith("This model's maximum context length is 4096 tokens.")
    assert "your messages resulted in 4114 tokens" in error["message"]
    assert "your prompt resulted in 4096 tokens" in limited["message"]


@pytest.mark.parametrize("fields", [{}, {"max_tokens": 5000}, {"max_completion_tokens": 4096}])
async def test_answer_takes_the_room_that_is_left(fields: dict[str, Any]) -> None:
    async with serving(ScriptedBackend("y" * 5000)) as served, served.http() as http:
        body = chat("x" * 4000, **fields)
        answer = (await http.post("/v1/chat/completions", json=body)).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 4096


async def test_sentences_name_the_field_that_was_sent() -> None:
    async with serving(ScriptedBackend()) as served, served.http() as http:
        for name in ("max_tokens", "max_completion_tokens"):
            answer = await http.post("/v1/chat/completions", json=chat() | {name: 0})
            message = answer.json()["error"]["message"]
            assert message == f"{name} is 0 but must be an integer of at least 1"


@pytest.mark.parametrize("stop", ["", [], [""], None])
async def test_empty_stop_is_none(stop: Any) -> None:
    async with serving(ScriptedBackend("abc")) as served, served.http() as http:
        answer = await http.post("/v1/chat/completions", json=chat(stop=stop))
    assert answer.json()["choices"][0]["message"]["content"] == "abc"


HALF = rb'{"messages": [{"role": "user", "content": "\ud800"}]}'


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "it has no body"),
        (HALF, "a string holds half of a surrogate pair, which is no character"),
        (HALF.replace(rb"\ud800", rb"\ud83d\ude00")[:-1], "Input data was truncated"),
    ],
)
async def test_body_that_cannot_be_read_is_told_in_words(body: bytes, told: str) -> None:
    async with serving(ScriptedBackend()) as served, served.http() as http:
        headers = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
        answer = await http.post("/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == f"the request cannot be read: {told}"


async def test_unknown_model_is_not_found() -> None:
    async with serving(ScriptedBackend("hello")) as served:
        client = served.openai()
        with pytest.raises(openai.NotFoundError, match=r"'gpt-4'.*'scripted'") as caught:
            await client.chat.completions.create(model="gpt-4", messages=MESSAGES)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("gpt-4")
        for name in ("", "d2f", "scripted"):
            answer = await client.chat.completions.create(model=name, messages=MESSAGES)
            assert answer.model == "scripted"


async def test_token_is_needed_where_there_are_some() -> None:
    auth = Auth({"ann": TOKEN})
    async with serving(ScriptedBackend("hello"), auth=auth) as served:
        stranger, ann = served.openai("wrong"), served.openai()
        with pytest.raises(openai.AuthenticationError) as caught:
            await stranger.chat.completions.create(model="d2f", messages=MESSAGES)
        assert caught.value.code == "invalid_api_key"
        assert caught.value.response.headers["www-authenticate"] == "Bearer"
        with pytest.raises(openai.AuthenticationError):
            await stranger.models.list()
        with pytest.raises(openai.AuthenticationError):
            await stranger.models.retrieve("scripted")
        assert await ann.models.list()
        answer = await ann.chat.completions.create(model="d2f", messages=MESSAGES)
        assert answer.choices[0].message.content == "hello"


@pytest.mark.parametrize("stream", [False, True])
async def test_rate_limit_says_when_to_come_again(stream: bool) -> None:
    limits = ServeLimits(requests_per_minute=1)
    async with serving(ScriptedBackend("hello"), limits=limits) as served:
        create = served.openai().chat.completions.create
        await create(model="d2f", messages=MESSAGES)
        with pytest.raises(openai.RateLimitError, match="1 requests a minute") as caught:
            await create(model="d2f", messages=MESSAGES, stream=stream)
    assert (caught.value.code, caught.value.type) == ("rate_limited", "rate_limit_error")
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60


async def test_answer_beyond_the_server_s_limit_is_too_large() -> None:
    async with serving(ScriptedBackend(), limits=ServeLimits(max_new_tokens=100)) as served:
        with pytest.raises(openai.APIStatusError, match="allows 100") as caught:
            await served.openai().chat.completions.create(
                model="d2f", messages=MESSAGES, max_tokens=101
            )
    assert (caught.value.status_code, caught.value.code) == (413, "message_too_large")


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
async def test_body_that_is_not_called_json_is_refused(content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    async with serving(ScriptedBackend()) as served, served.http() as http:
        content = json.dumps(chat()).encode()
        answer = await http.post("/v1/chat/completions", content=content, headers=headers)
    assert answer.status_code == 415
    assert answer.json()["error"]["code"] == "unsupported_media_type"


@settings(max_examples=100, deadline=None)
@given(
    body=st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(["messages", "prompt", "role", "content", "stop", "d2f", "n"])
                | st.text(),
                inner,
            )
        ),
        max_leaves=12,
    ).map(lambda value: json.dumps(value).encode())
)
async def test_any_body_is_answered_with_a_proper_error(body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    async with serving(ScriptedBackend("x")) as served, served.http() as http:
        for path in ("/v1/chat/completions", "/v1/completions"):
            answer = await http.post(path, content=body, headers=headers)
            if answer.status_code != 200:
                assert answer.status_code in (400, 404, 413)
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("stream", [False, True])
async def test_server_that_shuts_down_takes_nothing(stream: bool) -> None:
    async with serving(ScriptedBackend()) as served:
        await served.registry.shut_down(0.0)
        with pytest.raises(openai.InternalServerError) as caught:
            await served.openai().chat.completions.create(
                model="d2f", messages=MESSAGES, stream=stream
            )
    assert (caught.value.status_code, caught.value.code) == (503, "shutting_down")
    assert caught.value.type == "server_error"


async def test_failed_engine_is_an_error_of_the_server() -> None:
    async with serving(
        ScriptedBackend("hi", errors={0: RuntimeError("the GPU is gone")})
    ) as served:
        with pytest.raises(openai.InternalServerError, match="the GPU is gone") as caught:
            await served.openai().chat.completions.create(model="d2f", messages=MESSAGES)
        assert (caught.value.status_code, caught.value.code) == (503, "engine_failed")
        with pytest.raises(openai.InternalServerError) as later:
            await served.openai().chat.completions.create(model="d2f", messages=MESSAGES)
        assert later.value.code == "engine_failed"


async def test_stream_that_fails_ends_with_the_error() -> None:
    backend = ScriptedBackend("a" * 40, errors={4: RuntimeError("the GPU is gone")})
    received: list[str | None] = []

    async def read(served: Serving) -> None:
        chunks = await served.openai().chat.completions.create(
            model="d2f", messages=MESSAGES, stream=True
        )
        async for chunk in chunks:
            received.append(chunk.choices[0].delta.content)  # noqa: PERF401 - it raises

    async with serving(backend) as served:
        with pytest.raises(openai.APIError, match="the GPU is gone") as caught:
            await read(served)
    assert caught.value.code == "engine_failed"
    assert "".join(filter(None, received)) == "a" * 16


class BrokenBackend(ScriptedBackend):
    def check(self, params: GenerationParams) -> None:
        raise RuntimeError("a mistake of ours")


async def test_mistake_of_ours_is_logged_and_answered(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(BrokenBackend()) as served:
        with pytest.raises(openai.InternalServerError, match="inside the server") as caught:
            await served.openai().chat.completions.create(model="d2f", messages=MESSAGES)
    assert (caught.value.status_code, caught.value.code) == (500, "error")
    assert "a mistake of ours" in caplog.text
