"""What the test clients of /v1/stream have in common, whatever they speak through."""

from typing import TypeVar

from d2f_stream.core.events import StreamStarted
from d2f_stream.wire.protocol import RequestRejected, ServerHello, ServerMessage

Kind = TypeVar("Kind", bound=ServerMessage)


class Expecting:
    """Receives messages of a kind that the test names."""

    async def receive(self) -> ServerMessage:
        raise NotImplementedError

    async def expect(self, kind: type[Kind]) -> Kind:
        message = await self.receive()
        assert isinstance(message, kind), message
        return message

    async def hello(self) -> ServerHello:
        return await self.expect(ServerHello)

    async def started(self) -> StreamStarted:
        return await self.expect(StreamStarted)

    async def rejected(self) -> RequestRejected:
        return await self.expect(RequestRejected)
