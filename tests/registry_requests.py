"""Requests to a StreamRegistry, and their answers read."""

from typing import Any

from d2f_stream.core.events import Block, Event
from d2f_stream.server.streams.served_stream import ServedStream
from d2f_stream.wire.protocol import Generate, OnDisconnect, Overrides

LONG = "a" * 4000


def request(
    name: str = "request",
    *,
    prompt: str = "hi",
    on_disconnect: OnDisconnect = "continue",
    **fields: Any,
) -> Generate:
    return Generate(
        request_id=name.ljust(16, "-"),
        prompt=prompt,
        params=Overrides(**fields),
        on_disconnect=on_disconnect,
    )


async def read(stream: ServedStream, *, after_seq: int = -1, drafts: bool = False) -> list[Event]:
    return [event async for event in stream.follow(after_seq=after_seq, drafts=drafts)]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Block))
