from typing import get_args

import msgspec
import pytest

from d2f_stream.core.events import Block, Draft, Event, StreamFailed, StreamFinished, StreamStarted
from fakes import block, draft, failed, finished, started

EVENTS: list[Event] = [started(), block(3, "naïve 🙂"), draft(2), finished(4), failed(5)]


def test_tags_are_the_names_on_the_wire() -> None:
    tags = {kind: kind.__struct_config__.tag for kind in get_args(Event)}
    assert tags == {
        StreamStarted: "stream.started",
        Block: "block.committed",
        Draft: "block.draft",
        StreamFinished: "stream.finished",
        StreamFailed: "stream.failed",
    }


@pytest.mark.parametrize("event", EVENTS)
def test_events_survive_json_and_msgpack(event: Event) -> None:
    assert msgspec.json.decode(msgspec.json.encode(event), type=Event) == event
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(event), type=Event) == event


def test_unknown_fields_are_ignored() -> None:
    fields = msgspec.to_builtins(block(0)) | {"added_later": 1}
    assert msgspec.convert(fields, Event) == block(0)


def test_durable_events_carry_seq_and_drafts_do_not() -> None:
    assert [kind for kind in get_args(Event) if "seq" not in kind.__struct_fields__] == [Draft]


def test_events_are_frozen() -> None:
    with pytest.raises(AttributeError):
        block(0).text = "other"  # type: ignore[misc]


def test_tokens_per_step() -> None:
    assert finished().usage.tokens_per_step == 2.0
    assert msgspec.structs.replace(finished().usage, steps=0).tokens_per_step == 0.0
