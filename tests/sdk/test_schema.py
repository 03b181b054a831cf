import json
from pathlib import Path
from typing import Any, get_args

import pytest
from jsonschema import Draft202012Validator

from d2f_stream import schema
from d2f_stream.core.events import Event
from d2f_stream.schema.documents import asyncapi, documents, json_schema
from d2f_stream.wire.codec import JSON
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
)
from d2f_stream.wire.topics import parse
from fakes import block, draft, failed, finished, started

FOLDER = Path(schema.__file__).parent
CARD = ModelCard(
    name="m",
    family="dream",
    native_block_size=8,
    max_block_size=32,
    max_len=512,
    defaults=ModelDefaults(),
)
OPERATIONS: list[Operation] = [
    Authenticate(token="t"),
    Generate(request_id="r" * 16, prompt="hi", params=Overrides(seed=None, stop=("a",))),
    Generate(request_id="r" * 16, prompt=[1, 2], on_disconnect="cancel"),
    Generate(request_id="r" * 16, prompt=[{"role": "user", "content": "hi"}]),
    Cancel(stream="s"),
    Resume(stream="s", after_seq=3, drafts=True),
]
MESSAGES: list[ServerMessage] = [
    *(started(), block(3, "naïve 🙂"), draft(2), finished(4), failed(5)),
    ServerHello(protocol=1, model=CARD, resume_ttl_s=300.0),
    RequestRejected(code="rate_limited", message="later", retry_after_s=1.5),
    ServerClosing(message="bye", deadline_s=5.0),
]


def validator(name: str) -> Any:
    return Draft202012Validator(json_schema() | {"anyOf": [{"$ref": f"#/$defs/{name}"}]})


@pytest.mark.parametrize("name", documents())
def test_committed_document_is_what_the_classes_say(name: str) -> None:
    committed = (FOLDER / name).read_text(encoding="utf-8")
    assert committed == documents()[name], "run: python -m d2f_stream.schema"


def test_schema_is_a_valid_one() -> None:
    Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("operation", OPERATIONS)
def test_encoded_operations_are_valid(operation: Operation) -> None:
    value = json.loads(JSON.encode(operation))
    validator("Operation").validate(value)
    validator("Operation").validate(value | {"added_later": 1})
    assert not validator("ServerMessage").is_valid(value)


@pytest.mark.parametrize("message", MESSAGES)
def test_encoded_messages_are_valid(message: ServerMessage) -> None:
    value = json.loads(JSON.encode(message))
    validator("ServerMessage").validate(value)
    assert not validator("Operation").is_valid(value)
    without_type = {name: field for name, field in value.items() if name != "type"}
    assert not validator("ServerMessage").is_valid(without_type)


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "generate", "request_id": "r" * 16},
        {"type": "generate", "request_id": 7, "prompt": "hi"},
        {"type": "generate", "request_id": "r" * 16, "prompt": "hi", "params": {"seeed": 1}},
        {"type": "generate", "request_id": "r" * 16, "prompt": "hi", "on_disconnect": "wait"},
        {"type": "resume", "stream": "s", "after_seq": "3"},
        {"type": "unheard_of"},
    ],
)
def test_what_the_codec_refuses_is_not_valid(wrong: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"\$|`"):
        JSON.decode_operation(json.dumps(wrong))
    assert not validator("Operation").is_valid(wrong)


def test_every_operation_and_message_is_described() -> None:
    definitions = json_schema()["$defs"]
    for kind in (*get_args(Operation), *get_args(ServerMessage), *get_args(Event)):
        found = definitions[kind.__name__]
        assert found["properties"]["type"] == {"enum": [kind.__struct_config__.tag]}
        assert len(found["description"]) > 20


def test_asyncapi_document_is_one_and_its_references_lead_somewhere() -> None:
    document = asyncapi()

    def check(value: Any) -> None:
        if isinstance(value, dict):
            assert "discriminator" not in value  # which is a string there, not OpenAPI's object
            reference = value.get("$ref")
            if isinstance(reference, str):
                found: Any = document
                for step in reference.removeprefix("#/").split("/"):
                    found = found[step]
            for inner in value.values():
                check(inner)
        elif isinstance(value, list):
            for inner in value:
                check(inner)

    check(document)


def test_every_mqtt_channel_is_a_topic_of_ours() -> None:
    channels = {name: c for name, c in asyncapi()["channels"].items() if name != "stream"}
    assert channels
    names = {"client": "ann", "request_id": "r" * 16, "node": "gpu-1"}
    for channel in channels.values():
        topic = channel["address"].format(**names)
        assert str(parse(topic)) == topic
        assert set(channel["parameters"]) == {n for n in names if f"{{{n}}}" in channel["address"]}
