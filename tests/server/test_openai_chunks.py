from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2f_stream.core.events import Event, FinishReason
from d2f_stream.server.openai.chunks import AnswerWriter, Dialect
from d2f_stream.server.openai.requests import ChatRequest, CompletionRequest
from fakes import block, draft, finished, started


def writer(dialect: Dialect = "chat", **fields: Any) -> AnswerWriter:
    return AnswerWriter(dialect=dialect, name="n", created=1, model="m", **fields)


def written(events: list[Event], of: AnswerWriter) -> list[dict[str, Any]]:
    chunks = [chunk for event in events for chunk in of.chunks(event)]
    return [msgspec.to_builtins(chunk) for chunk in chunks]


def texts(chunks: list[dict[str, Any]]) -> list[str]:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return [c["text"] if "text" in c else c["delta"].get("content", "") for c in choices]


pieces = st.lists(st.text(max_size=6), max_size=6)


@given(pieces=pieces, dialect=st.sampled_from(["chat", "text"]), usage=st.booleans())
def test_deltas_concatenate_to_the_text(pieces: list[str], dialect: Dialect, usage: bool) -> None:
    blocks = [block(index, text) for index, text in enumerate(pieces)]
    events: list[Event] = [started(), *blocks, finished(len(blocks) + 1)]
    chunks = written(events, writer(dialect, include_usage=usage))
    assert "".join(texts(chunks)) == "".join(pieces)
    assert len(chunks) == len(blocks) + 1 + (dialect == "chat") + usage
    whole = msgspec.to_builtins(writer(dialect).body([(blocks, finished())]))
    [choice] = whole["choices"]
    assert (choice["message"]["content"] if dialect == "chat" else choice["text"]) == "".join(
        pieces
    )


@given(
    pieces=pieces,
    drafts=st.lists(st.tuples(st.integers(0, 7), st.text(max_size=6)), max_size=10),
    dialect=st.sampled_from(["chat", "text"]),
)
def test_replacing_texts_begin_with_what_is_final_and_end_with_all_of_it(
    pieces: list[str], drafts: list[tuple[int, str]], dialect: Dialect
) -> None:
    of = writer(dialect, diffusing=True)
    written([started()], of)
    final, last = "", ""
    for index, text in enumerate(pieces):
        for number, provisional in drafts:
            if number >= index:
                for shown in texts(written([draft(number, provisional)], of)):
                    assert shown.startswith(final)
                    assert shown != last
                    last = shown
        final += text
        [last] = texts(written([block(index, text)], of))
        assert last.startswith(final)
    [end] = texts(written([finished(9)], of))
    assert end == "".join(pieces)


def test_draft_of_several_blocks_stand_in_order() -> None:
    of = writer(diffusing=True)
    events: list[Event] = [started(), draft(1, "second"), draft(0, "fi"), block(0, "first ")]
    assert texts(written(events, of)) == ["", "second", "fisecond", "first second"]


def test_drafts_do_not_show_in_plain_streams() -> None:
    assert texts(written([started(), draft(0, "x"), block(0, "y")], writer())) == ["", "y"]


@pytest.mark.parametrize(
    ("reason", "shown"),
    [("eos", "stop"), ("stop", "stop"), ("length", "length"), ("cancelled", "stop")],
)
def test_reasons_in_openai_s_words(reason: FinishReason, shown: str) -> None:
    end = msgspec.structs.replace(finished(), reason=reason)
    [chunk] = written([end], writer())
    assert chunk["choices"][0]["finish_reason"] == shown
    assert chunk["d2f"]["reason"] == reason


def test_json_of_a_chunk_has_openai_s_fields() -> None:
    [chunk] = written([block(0, "hi")], writer())
    assert chunk == {
        "id": "chatcmpl-n",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [
            {"index": 0, "delta": {"content": "hi"}, "logprobs": None, "finish_reason": None}
        ],
        "d2f": {"type": "block.committed", "stream": "stream-1", "seq": 1, "index": 0, "steps": 1},
    }


def test_settings_in_d2f_win_and_null_is_absent() -> None:
    body = {
        "messages": [],
        "temperature": 0.5,
        "top_p": None,
        "max_tokens": 7,
        "stop": "x",
        "d2f": {"temperature": 0.0, "block_size": 4, "drafts": True, "logprobs": True},
    }
    asked = msgspec.convert(body, ChatRequest)
    assert asked.overrides().to_dict() == {
        "max_new_tokens": 7,
        "temperature": 0.0,
        "stop": ("x",),
        "block_size": 4,
        "drafts": False,
        "logprobs": False,
    }
    assert asked.param_of("temperature") == "d2f.temperature"
    assert asked.param_of("max_new_tokens") == "max_tokens"
    assert asked.param_of("stop") == "stop"


def test_drafts_are_made_for_diffusing_streams_only() -> None:
    fields = {"prompt": "hi", "diffusing": True}
    assert msgspec.convert(fields | {"stream": True}, CompletionRequest).overrides().drafts is True
    assert msgspec.convert(fields, CompletionRequest).overrides().drafts is False
