"""The OpenAI routes as its client calls them: what is answered."""

from typing import Any

import openai
import pytest

import d2f_stream
from d2f_runtime.backends.scripted import ScriptedBackend
from fakes import ANSWER, info
from openai_serving import MESSAGES, Serving, chat, serving, serving_engine

PROMPT = "user: hi\nassistant: "


async def streamed(served: Serving, **fields: Any) -> list[Any]:
    chunks = await served.openai().chat.completions.create(
        model="d2f", messages=MESSAGES, stream=True, **fields
    )
    return [chunk async for chunk in chunks]


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


async def test_answer_comes_whole_with_its_usage() -> None:
    async with serving(ScriptedBackend({PROMPT: ANSWER})) as served:
        answer = await served.openai().chat.completions.create(model="scripted", messages=MESSAGES)
    num_tokens = len(ANSWER.encode()) + 1
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "scripted"
    [choice] = answer.choices
    assert (choice.index, choice.message.role, choice.message.content) == (0, "assistant", ANSWER)
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.completion_tokens == num_tokens
    assert answer.usage.total_tokens == len(PROMPT) + num_tokens
    report = answer.model_extra["d2f"] if answer.model_extra else {}
    assert report["reason"] == "eos"
    assert report["tokens_per_step"] == num_tokens / report["steps"]
    assert report["timings"]["total_ms"] >= report["timings"]["first_block_ms"] > 0


async def test_stream_is_a_role_then_a_delta_for_each_block_then_the_reason() -> None:
    async with serving(ScriptedBackend(ANSWER)) as served:
        chunks = await streamed(served)
    first, *blocks, last = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert text_of(chunks) == ANSWER
    assert len(blocks) == -(-(len(ANSWER.encode()) + 1) // 8)
    assert [chunk.d2f["type"] for chunk in blocks] == ["block.committed"] * len(blocks)
    assert [chunk.d2f["index"] for chunk in blocks] == [*range(len(blocks))]
    assert [chunk.d2f["seq"] for chunk in chunks] == [*range(len(chunks))]
    steps = [chunk.d2f["steps"] for chunk in blocks]
    assert steps == sorted(steps)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert last.choices[0].finish_reason == "stop"
    assert last.choices[0].delta.content is None
    assert (
        len({chunk.id for chunk in chunks}) == len({chunk.d2f["stream"] for chunk in chunks}) == 1
    )
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert "usage" not in first.model_fields_set


async def test_include_usage_adds_a_chunk_without_choices() -> None:
    async with serving(ScriptedBackend("eight by")) as served:
        chunks = await streamed(served, stream_options={"include_usage": True})
    *others, last = chunks
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(PROMPT), 9)
    assert last.usage.total_tokens == len(PROMPT) + 9
    assert [chunk.usage for chunk in others] == [None] * len(others)
    assert all("usage" in chunk.model_fields_set for chunk in others)


async def test_frames_and_headers_of_a_stream() -> None:
    async with serving(ScriptedBackend("twelve bytes")) as served, served.http() as http:
        answer = await http.post("/v1/chat/completions", json=chat(stream=True))
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    frames = answer.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    assert all(frame.startswith("data: {") for frame in frames[:-2])


@pytest.mark.parametrize("stream", [False, True])
async def test_max_tokens_ends_with_length(stream: bool) -> None:
    async with serving(ScriptedBackend("abc" * 100)) as served:
        for name in ("max_tokens", "max_completion_tokens"):
            if stream:
                chunks = await streamed(served, **{name: 20})
                text, reason = text_of(chunks), chunks[-1].choices[0].finish_reason
            else:
                fields: Any = {name: 20}
                answer = await served.openai().chat.completions.create(
                    model="d2f", messages=MESSAGES, **fields
                )
                text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
            assert (text, reason) == (("abc" * 7)[:20], "length")


async def test_stop_string_split_over_blocks_never_shows() -> None:
    async with serving(ScriptedBackend("1234567. The end")) as served:
        chunks = await streamed(served, stop=". The", max_tokens=64)
        listed = await streamed(served, stop=["nowhere", "The end"])
    assert text_of(chunks) == "1234567"
    assert [chunk.choices[0].delta.content for chunk in chunks[1:-1]] == ["1234567", ""]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].d2f["reason"] == "stop"
    assert text_of(listed) == "1234567. "


async def test_sampling_parameters_reach_the_engine() -> None:
    backend = ScriptedBackend("abc")
    async with serving(backend) as served:
        client = served.openai().chat.completions
        for _ in range(2):
            await client.create(
                model="d2f", messages=MESSAGES, temperature=0.7, top_p=0.9, seed=11, user="ann"
            )
        await client.create(
            model="d2f",
            messages=MESSAGES,
            temperature=None,
            top_p=None,
            seed=None,
            extra_body={"d2f": {"block_size": 4, "rank": "margin"}},
        )
    first, second, third = [batch[0] for batch in backend.batches]
    assert (first.temperature, first.top_p) == (0.7, 0.9)
    assert first.uniforms == second.uniforms is not None
    assert (third.temperature, third.rank, len(third.window.tokens)) == (
        0.0,
        "margin",
        len(PROMPT) + 4,
    )


async def test_diffusing_replaces_the_text_and_ends_with_the_final_one() -> None:
    async with serving(ScriptedBackend(ANSWER)) as served:
        chunks = await streamed(served, extra_body={"diffusing": True})
    texts = [chunk.choices[0].delta.content for chunk in chunks]
    kinds = [chunk.d2f["type"] for chunk in chunks]
    assert texts[-1] == ANSWER
    assert "block.draft" in kinds
    committed = ""
    for chunk in chunks[1:]:
        shown = chunk.choices[0].delta.content
        if chunk.d2f["type"] == "block.committed":
            committed = shown[: max(len(committed), 1)]
        assert shown.startswith(committed)
    assert len(texts) > len([kind for kind in kinds if kind == "block.committed"]) + 2


async def test_diffusing_without_stream_is_the_plain_answer() -> None:
    async with serving(ScriptedBackend(ANSWER)) as served:
        answer = await served.openai().chat.completions.create(
            model="d2f", messages=MESSAGES, extra_body={"diffusing": True}
        )
    assert answer.choices[0].message.content == ANSWER


@pytest.mark.parametrize(
    "prompt", ["say", ["say"], [*b"say"], [[*b"say"]]], ids=["text", "list", "ids", "list of ids"]
)
@pytest.mark.parametrize("stream", [False, True])
async def test_completions_take_one_prompt_verbatim(prompt: Any, stream: bool) -> None:
    async with serving(ScriptedBackend({"say": ANSWER})) as served:
        create = served.openai().completions.create
        if stream:
            chunks = [c async for c in await create(model="d2f", prompt=prompt, stream=True)]
            text = "".join(chunk.choices[0].text for chunk in chunks)
            last = chunks[-1]
        else:
            last = await create(model="d2f", prompt=prompt)
            text = last.choices[0].text
    assert (text, last.object) == (ANSWER, "text_completion")
    assert last.id.startswith("cmpl-")
    assert last.choices[0].finish_reason == "stop"


async def test_messages_of_every_role_and_of_text_parts() -> None:
    script = {
        "system: a\nsystem: b\nuser: one two\nassistant: three\nuser: and?\nassistant: ": "four"
    }
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages: Any = [
        {"role": "system", "content": "a"},
        {"role": "developer", "content": "b", "name": "boss"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "three", "tool_calls": None},
        {"role": "user", "content": "and?"},
    ]
    async with serving(ScriptedBackend(script)) as served:
        answer = await served.openai().chat.completions.create(model="d2f", messages=messages)
    assert answer.choices[0].message.content == "four"


async def test_answer_that_is_begun_is_continued() -> None:
    messages: Any = [
        {"role": "user", "content": "count"},
        {"role": "assistant", "content": "one "},
    ]
    async with serving(ScriptedBackend({"user: count\nassistant: one ": "two"})) as served:
        answer = await served.openai().chat.completions.create(
            model="d2f", messages=messages, extra_body={"continue_final_message": True}
        )
    assert answer.choices[0].message.content == "two"


CALL: Any = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}


async def test_turns_with_tools_are_accepted_as_history() -> None:
    """As LangChain, Open WebUI and `message.model_dump()` of the openai client send them back."""
    nothing = dict.fromkeys(("refusal", "annotations", "audio", "function_call"))
    broken = {"function": {"name": "sub", "arguments": "no JSON"}}
    messages: Any = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL, broken], **nothing},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
        {"role": "tool", "content": [{"type": "text", "text": "5"}], "tool_call_id": "2"},
        {"role": "assistant", "content": None, "refusal": "I cannot."},
        {"role": "assistant", "content": "So", "function_call": {"name": "end", "arguments": ""}},
        {"role": "function", "content": None, "name": "end"},
    ]
    calls = (
        '<tool_call>\n{"name":"add","arguments":{"a":1}}\n</tool_call>\n'
        '<tool_call>\n{"name":"sub","arguments":"no JSON"}\n</tool_call>'
    )
    results = "<tool_response>\n4\n</tool_response>\n<tool_response>\n5\n</tool_response>"
    prompt = (
        f"user: ?\nassistant: {calls}\nuser: {results}\nassistant: I cannot.\n"
        'assistant: So\n<tool_call>\n{"name":"end","arguments":""}\n</tool_call>\n'
        "user: <tool_response>\n\n</tool_response>\nassistant: "
    )
    async with serving(ScriptedBackend({prompt: "eight"})) as served:
        answer = await served.openai().chat.completions.create(model="d2f", messages=messages)
    assert answer.choices[0].message.content == "eight"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "critic", "content": "4"}, "messages[0].role"),
        ({"role": "user", "content": "4", "tool_calls": [CALL]}, "messages[0].tool_calls"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content[0]"),
    ],
)
async def test_messages_that_are_not_text_are_refused(message: Any, param: str) -> None:
    async with serving(ScriptedBackend()) as served:
        with pytest.raises(openai.BadRequestError) as caught:
            await served.openai().chat.completions.create(model="d2f", messages=[message])
    assert (caught.value.param, caught.value.code) == (param, "unsupported_parameter")


async def test_models_are_listed_with_what_they_can_do() -> None:
    backend = ScriptedBackend(info=info(name="maker/small", max_len=77))
    async with serving(backend) as served:
        client = served.openai()
        [model] = [model async for model in client.models.list()]
        found = await client.models.retrieve("maker/small")
    assert model == found
    assert (model.id, model.object, model.owned_by) == ("maker/small", "model", "d2f_stream")
    assert model.model_extra is not None
    assert model.model_extra["d2f"]["max_len"] == 77
    assert model.model_extra["d2f"]["defaults"]["block_size"] == 8


async def test_embedded_model_solves_a_word_problem() -> None:
    problem = "Ben has 34 books. He buys 18 more books. How many books does he have now?"
    messages: Any = [{"role": "user", "content": problem}]
    async with d2f_stream.load() as engine, serving_engine(engine) as served:
        create = served.openai().chat.completions.create
        whole = await create(model="word-problems", messages=messages)
        chunks = [c async for c in await create(model="d2f", messages=messages, stream=True)]
        plain = await served.openai().completions.create(model="d2f", prompt=problem)
    text = whole.choices[0].message.content
    assert text is not None
    assert "The answer is 52" in text
    assert text_of(chunks) == text == plain.choices[0].text
    assert whole.usage == plain.usage
