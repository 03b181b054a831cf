"""Peer: the client's end of a connection in memory, message by message."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from d2f_stream.channels import ChannelClosed
from d2f_stream.channels.memory import MemoryChannel
from d2f_stream.core.events import Block, Draft, Event, StreamFinished, StreamStarted
from d2f_stream.server.auth import Auth
from d2f_stream.wire.codec import JSON, Codec
from d2f_stream.wire.protocol import (
    Generate,
    Operation,
    Overrides,
    ServerHello,
    ServerMessage,
)
from memory_network import Network
from peers import Expecting

LONG = "a" * 4000
TOKENS = Auth({"alice": "alice-token", "bob": "bob-token"})


def request(name: str = "request", *, prompt: str = "hi", **fields: Any) -> Generate:
    return Generate(request_id=name.ljust(16, "-"), prompt=prompt, params=Overrides(**fields))


class Peer(Expecting):
    """The client's end of one connection, message by message."""

    def __init__(self, channel: MemoryChannel, serving: "asyncio.Task[None]") -> None:
        self.channel = channel
        self.serving = serving

    async def send(self, *operations: Operation) -> None:
        for operation in operations:
            await self.channel.send(self.channel.codec.encode(operation))

    async def receive(self) -> ServerMessage:
        message = self.channel.codec.decode_message(await self.channel.receive())
        assert message is not None
        return message

    async def to_the_end(self) -> list[Event]:
        events: list[Event] = []
        while not (events and isinstance(events[-1], StreamFinished)):
            message = await self.receive()
            assert isinstance(message, StreamStarted | Block | Draft | StreamFinished), message
            events.append(message)
        return events

    async def closed(self) -> tuple[int, str]:
        try:
            while True:
                await self.channel.receive()
        except ChannelClosed as closed:
            await self.serving
            return closed.code, closed.reason


@asynccontextmanager
async def peer_of(
    net: Network,
    *,
    client: str | None = "alice",
    codec: Codec = JSON,
    capacity: int = 16,
    greeted: bool = True,
) -> AsyncIterator[Peer]:
    near, far = MemoryChannel.pair(codec=codec, capacity=capacity)
    serving = asyncio.create_task(net.gateway.serve(far, client=client))
    peer = Peer(near, serving)
    if greeted:
        assert isinstance(await peer.receive(), ServerHello)
    try:
        yield peer
    finally:
        await near.close()
        await serving


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Block))
