import contextlib
from collections.abc import Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, UnsetType

from d2f_stream.core.errors import InvalidRequest, ProtocolError
from d2f_stream.core.params import GenerationParams
from d2f_stream.wire.codec import JSON, MSGPACK, Codec
from d2f_stream.wire.protocol import (
    Authenticate,
    Cancel,
    Generate,
    ModelCard,
    ModelDefaults,
    Operation,
    Overrides,
    RequestRejected,
    Resume,
    ServerClosing,
    ServerHello,
    ServerMessage,
    check_request_id,
    wire_prompt,
)
from fakes import block, draft, failed, finished, started

CARD = ModelCard(
    name="fake",
    family="dream",
    native_block_size=4,
    max_block_size=8,
    max_len=64,
    defaults=ModelDefaults(),
)
OPERATIONS: list[Operation] = [
    Authenticate(token="naïve"),
    Generate(request_id="r" * 16, prompt="hi"),
    Generate(request_id="r" * 16, prompt=[1, 2], params=Overrides(stop=("a",), seed=None)),
    Generate(request_id="r" * 16, prompt=[{"role": "user", "content": "hi"}]),
    Cancel(stream="s"),
    Cancel(request_id="r" * 16),
    Resume(stream="s", after_seq=3, drafts=True),
]
MESSAGES: list[ServerMessage] = [
    *(started(), block(0, "naïve 🙂"), draft(1), finished(2), failed(3)),
    ServerHello(protocol=1, model=CARD, resume_ttl_s=300.0),
    RequestRejected(code="rate_limited", message="slow down", retry_after_s=1.5),
    ServerClosing(message="bye", deadline_s=10.0),
]
both_codecs = pytest.mark.parametrize("codec", [JSON, MSGPACK], ids=lambda codec: codec.name)


@both_codecs
def test_operations_and_messages_survive_the_wire(codec: Codec) -> None:
    assert {type(operation) for operation in OPERATIONS} == set(get_args(Operation))
    assert {type(message) for message in MESSAGES} == set(get_args(ServerMessage))
    for operation in OPERATIONS:
        assert codec.decode_operation(codec.encode(operation)) == operation
    for message in MESSAGES:
        assert codec.decode_message(codec.encode(message)) == message


@both_codecs
@pytest.mark.parametrize("stop", ["\n", ("a", "b"), ()])
def test_stop_travels_as_a_string_or_an_array(codec: Codec, stop: str | tuple[str, ...]) -> None:
    asked = Generate(request_id="r" * 16, prompt="hi", params=Overrides(stop=stop))
    assert codec.decode_operation(codec.encode(asked)) == asked


def test_json_may_come_as_text() -> None:
    data = JSON.encode(OPERATIONS[1])
    assert JSON.decode_operation(data.decode()) == OPERATIONS[1]


def test_overrides_are_the_fields_of_the_parameters() -> None:
    assert Overrides.__struct_fields__ == GenerationParams.__struct_fields__
    fields, overrides = get_type_hints(GenerationParams), get_type_hints(Overrides)
    for name in GenerationParams.__struct_fields__:
        assert set(get_args(overrides[name])) == {*_alternatives(fields[name]), UnsetType}
    assert set(Overrides.__struct_defaults__) == {UNSET}


def _alternatives(kind: Any) -> tuple[Any, ...]:
    kinds = get_args(kind) if get_origin(kind) in (UnionType, Union) else (kind,)
    return tuple(tuple[str, ...] if kind == Sequence[str] else kind for kind in kinds)


def test_only_fields_that_were_set_override() -> None:
    assert Overrides().to_dict() == {}
    overrides = Overrides(seed=None, stop=("a",), max_active_blocks=None)
    assert overrides.to_dict() == {"seed": None, "stop": ("a",), "max_active_blocks": None}
    assert b"temperature" not in JSON.encode(Generate(request_id="r" * 16, prompt="hi"))


@both_codecs
def test_client_skips_messages_of_a_later_version(codec: Codec) -> None:
    library = msgspec.json if codec is JSON else msgspec.msgpack
    later = library.encode({"type": "block.revised", "stream": "s"})
    assert codec.decode_message(later) is None
    for message in MESSAGES:
        more = msgspec.to_builtins(message) | {"added_later": 1}
        if isinstance(message, ServerHello):
            more["model"]["defaults"]["added_later"] = 1
        assert codec.decode_message(library.encode(more)) == message


@pytest.mark.parametrize(
    "data",
    [b"", b"[", b"nul", b"\xff\xfe", b"[" * 100_000, "\ud800", b'"text"', b"{}", b'{"type":"no"}'],
    ids=range(9),
)
def test_what_is_no_operation_is_a_protocol_error(data: bytes | str) -> None:
    with pytest.raises(ProtocolError):
        JSON.decode_operation(data)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"type":"generate","prompt":"hi"}', "request_id"),
        ('{"type":"generate","request_id":"r","prompt":7}', "prompt"),
        ('{"type":"generate","request_id":"r","prompt":"hi","params":{"topp":1}}', "topp"),
        ('{"type":"resume","stream":"s","after_seq":"1"}', "after_seq"),
    ],
)
def test_operation_with_a_bad_field_is_an_invalid_request_that_names_it(
    text: str, named: str
) -> None:
    with pytest.raises(InvalidRequest, match=named):
        JSON.decode_operation(text)


@both_codecs
@given(data=st.binary(max_size=200))
def test_no_bytes_do_worse_than_an_error_of_ours(codec: Codec, data: bytes) -> None:
    for decode in (codec.decode_operation, codec.decode_message):
        with contextlib.suppress(ProtocolError, InvalidRequest):
            decode(data)


@given(cut=st.integers(0, 400), index=st.integers(0, len(OPERATIONS) - 1))
def test_truncated_operations_are_refused(cut: int, index: int) -> None:
    for codec in (JSON, MSGPACK):
        data = codec.encode(OPERATIONS[index])
        if cut < len(data):
            with pytest.raises(ProtocolError):
                codec.decode_operation(data[:cut])


@pytest.mark.parametrize("request_id", ["r" * 15, "r" * 129, "a b" * 8, "ä" * 20, "", "+" * 20])
def test_request_ids_that_can_be_guessed_or_do_not_fit_a_topic_are_refused(request_id: str) -> None:
    with pytest.raises(InvalidRequest, match="16 to 128"):
        check_request_id(request_id)


def test_prompts_travel_as_they_are() -> None:
    assert wire_prompt("hi") == "hi"
    assert wire_prompt((1, 2)) == [1, 2]
    messages = ({"role": "user", "content": "hi"},)
    assert wire_prompt(messages) == [{"role": "user", "content": "hi"}]
    with pytest.raises(InvalidRequest, match="prompt"):
        wire_prompt([1.5])
