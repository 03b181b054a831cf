"""A chat that ends with an assistant's message: continued, or followed by another of its turns."""

from typing import Any

import openai
import pytest

from d2f_runtime.backends.scripted import ScriptedBackend
from openai_serving import Serving, serving

BEGUN: Any = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SCRIPT = {
    "user: hi\nassistant: hello": " there",
    "user: hi\nassistant: hello\nassistant: ": "Anything else?",
}


async def answer(served: Serving, messages: Any = BEGUN, **more: bool) -> str | None:
    found = await served.openai().chat.completions.create(
        model="d2f", messages=messages, extra_body=more
    )
    return found.choices[0].message.content


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({}, "Anything else?"),
        ({"continue_final_message": True}, " there"),
        ({"continue_final_message": True, "add_generation_prompt": False}, " there"),
        ({"continue_final_message": False}, "Anything else?"),
        ({"continue_final_message": False, "add_generation_prompt": True}, "Anything else?"),
    ],
)
async def test_last_message_is_whole_unless_it_is_said_to_be_continued(
    more: dict[str, bool], text: str
) -> None:
    async with serving(ScriptedBackend(SCRIPT)) as served:
        assert await answer(served, **more) == text


async def test_question_is_answered_whatever_is_said_of_continuing() -> None:
    async with serving(ScriptedBackend({"user: hi\nassistant: ": "hello"})) as served:
        assert await answer(served, BEGUN[:1], continue_final_message=False) == "hello"
        assert await answer(served, BEGUN[:1], add_generation_prompt=True) == "hello"


@pytest.mark.parametrize(
    ("messages", "more", "param"),
    [
        (BEGUN[:1], {"continue_final_message": True}, "continue_final_message"),
        (
            BEGUN,
            {"continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
        ),
        (BEGUN, {"add_generation_prompt": False}, "add_generation_prompt"),
        (BEGUN[:1], {"add_generation_prompt": False}, "add_generation_prompt"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(
    messages: Any, more: dict[str, bool], param: str
) -> None:
    async with serving(ScriptedBackend(SCRIPT)) as served:
        with pytest.raises(openai.BadRequestError) as caught:
            await answer(served, messages, **more)
    assert caught.value.param == param
