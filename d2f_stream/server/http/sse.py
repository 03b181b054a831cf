"""Server-sent events over HTTP: a response whose client may leave or stop reading at any moment."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Final, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from d2f_stream.core.errors import SlowConsumer
from d2f_stream.server.streams.stall import Stall

__all__ = ["COMMENT", "DONE", "EventStream", "data_frame", "unless_disconnected"]

COMMENT: Final = b": keep-alive\n\n"
"""Says nothing; keeps proxies from closing a connection on which nothing comes."""

DONE: Final = b"data: [DONE]\n\n"
"""The last frame of OpenAI's streams."""

Result = TypeVar("Result")


def data_frame(json: bytes) -> bytes:
    """Return the frame of one JSON value, which must be on one line."""
    return b"data: " + json + b"\n\n"


class EventStream(StreamingResponse):
    """A response of server-sent events.

    Args:
        frames: closed at the end, however it comes.
        stall_timeout_s: how long the client may not take what is sent, seconds.
        on_end: called once at the end: however it came, whether or not `frames` had begun.
        on_stall: is told of a client that did not take anything for that long.
        media_type: of the frames.
    """

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        *,
        stall_timeout_s: float,
        on_end: Callable[[], None],
        on_stall: Callable[[SlowConsumer], None],
        media_type: str = "text/event-stream",
    ) -> None:
        # X-Accel-Buffering: nginx would else collect the frames before it passes them on.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(frames, media_type=media_type, headers=headers)
        self._frames = frames
        self._stall_timeout_s = stall_timeout_s
        self._on_end = on_end
        self._on_stall = on_stall

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the frames until they end, the client leaves, or it does not read."""
        del scope
        try:
            await unless_disconnected(receive, self._write(send))
        except ClientDisconnect:
            pass
        except SlowConsumer as error:
            self._on_stall(error)  # the response stays incomplete: the server drops the connection
        finally:
            try:
                await self._frames.aclose()
            finally:
                self._on_end()

    async def _write(self, send: Send) -> None:
        stall = Stall(self._stall_timeout_s)

        async def take(message: Message) -> None:
            try:
                with stall:
                    await send(message)
            except TimeoutError:
                sentence = f"the reader did not take a chunk for {self._stall_timeout_s:g} s"
                raise SlowConsumer(sentence) from None

        try:
            await take({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for frame in self._frames:
                await take({"type": "http.response.body", "body": frame, "more_body": True})
            await take({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            stall.close()


async def unless_disconnected(receive: Receive, work: Coroutine[None, None, Result]) -> Result:
    """Do the work while the client is there; cancel it when the client leaves. Safe to cancel.

    To be called once the request's body was read.

    Raises:
        ClientDisconnect: the client left before the work was done, or just then.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_wait_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if leaving.done():
            raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait((working, leaving))
        if not leaving.cancelled():
            leaving.exception()  # or asyncio says that nobody looked at it
        if not working.cancelled():
            working.exception()
    return working.result()


async def _wait_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
