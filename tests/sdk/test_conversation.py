"""The rules of a conversation, case by case; the browser's client runs the same table."""

import json
from typing import Any

import pytest

from conversation_cases import CASES
from d2f_stream.client.conversation import Conversation
from d2f_stream.core.errors import D2FError
from d2f_stream.core.events import StreamFinished
from d2f_stream.wire.codec import JSON
from d2f_stream.wire.protocol import Generate, Overrides
from fakes import Producer


class Client:
    """A conversation, its readers, and what it has said."""

    def __init__(self) -> None:
        self.conversation = Conversation(lambda: None)
        self.readers: dict[str, Producer] = {}

    def said(self) -> list[dict[str, Any]]:
        said: list[dict[str, Any]] = []
        while (post := self.conversation.next_post()) is not None:
            said.append(json.loads(JSON.encode(post.operation)))
        return said

    def outcome(self, name: str) -> list[str | None]:
        buffer = self.readers[name].buffer
        error: D2FError | None = buffer.error
        end = buffer.terminal
        if error is not None:
            outcome: str | None = error.code
        elif isinstance(end, StreamFinished):
            outcome = end.reason
        else:
            outcome = None if end is None else end.code
        return [outcome, buffer.text]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
async def test_case(case: dict[str, Any]) -> None:
    client = Client()
    said: list[dict[str, Any]] = []
    conversation = client.conversation
    for number, step in enumerate(case["steps"]):
        kind, given = next(iter(step.items()))
        match kind:
            case "ask":
                params = Overrides(drafts=True) if step.get("drafts") else Overrides()
                request = Generate(request_id=given, prompt=step.get("prompt", "hi"), params=params)
                client.readers[given] = Producer(high=1000)
                conversation.ask(request, client.readers[given].buffer)
            case "cancel":
                conversation.cancel(given)
            case "opened":
                conversation.opened()
            case "closed":
                conversation.closed(given, "")
            case "sends":
                assert len(said) == len(given), (number, said)
                for one, wanted in zip(said, given, strict=True):
                    assert one.items() >= wanted.items(), (number, said)
                said = []
            case "tells":
                found = {name: client.outcome(name) for name in given}
                assert found == given, number
            case "receive":
                message = JSON.decode_message(json.dumps(given))
                if message is not None:
                    conversation.receive(message)
            case _:
                raise AssertionError(f"there is no step {kind!r}")
        said += client.said()
