"""A server of a test's own lines, over memory: it answers each connection by what the test says."""

import asyncio
from dataclasses import dataclass

import msgspec

from d2f_stream.channels import Channel
from d2f_stream.channels.memory import MemoryChannel
from d2f_stream.wire.codec import JSON
from d2f_stream.wire.protocol import (
    Generate,
    Operation,
    ServerHello,
    ServerMessage,
)
from fakes import started, turn
from memory_network import Network, until

LONG = "a" * 4000


def client_tasks() -> list[str]:
    return [t.get_name() for t in asyncio.all_tasks() if t.get_name().startswith("d2f-client")]


async def until_down(net: Network) -> None:
    await until(lambda: not net.gateway.num_connections)
    await turn()


@dataclass
class Script:
    """A server of a few lines: each connection is answered by the test itself."""

    hello: ServerHello

    def __post_init__(self) -> None:
        self.ends: asyncio.Queue[MemoryChannel] = asyncio.Queue(maxsize=100)

    async def dial(self) -> Channel:
        near, far = MemoryChannel.pair()
        await self.ends.put(far)
        return near

    async def accept(self) -> "Far":
        far = Far(await self.ends.get())
        await far.send(self.hello)
        return far


@dataclass
class Far:
    """The server's end of one connection."""

    channel: MemoryChannel

    async def send(self, *messages: ServerMessage) -> None:
        for message in messages:
            await self.channel.send(JSON.encode(message))

    async def receive(self) -> Operation:
        return JSON.decode_operation(await self.channel.receive())

    async def request(self) -> Generate:
        operation = await self.receive()
        assert isinstance(operation, Generate)
        return operation


def start_of(request: Generate) -> ServerMessage:
    return msgspec.structs.replace(started(), request_id=request.request_id)
