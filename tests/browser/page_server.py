"""A server on a thread of its own, which a test drives from outside: steps, cuts, restarts."""

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from itertools import pairwise
from typing import Any, Self, TypeVar

import fakes
from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend, StepGate
from d2f_runtime.engine.local import LocalEngine
from d2f_stream.core.session import Engine
from d2f_stream.server.serve import Server, ServeSettings

Value = TypeVar("Value")


class PageServer:
    """Serves the page and a model; a context manager.

    Args:
        make_engine: called on the server's own event loop, again after a restart.
        settings: as of `ServeSettings`.
    """

    def __init__(
        self, make_engine: Callable[[], AbstractAsyncContextManager[Engine]], **settings: Any
    ) -> None:
        self._make_engine = make_engine
        self._settings = settings
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/"

    @property
    def num_connections(self) -> int:
        return self._call(lambda: self._server.gateway.num_connections)

    @property
    def num_streams(self) -> int:
        """Streams that can be read, those that ended included."""
        return self._call(lambda: self._server.registry.num_retained)

    def __enter__(self) -> Self:
        started: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)))
        self._thread.start()
        started.result()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._leave.set)
        self._thread.join()

    def sever(self) -> None:
        """Break every websocket as a dropped network does."""

        def abort() -> None:
            for connection in list(self._server._uvicorn.server_state.connections):
                if connection.transport is not None:
                    connection.transport.abort()

        self._call(abort)

    def stop(self) -> None:
        """Kill the server: what it knew is gone."""
        self.__exit__()

    def start(self) -> None:
        """Serve again on the same port."""
        self.__enter__()

    def _call(self, act: Callable[[], Value]) -> Value:
        async def run() -> Value:
            return act()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    async def _serve(self, started: "Future[None]") -> None:
        self._loop = asyncio.get_running_loop()
        self._leave = asyncio.Event()
        try:
            async with self._make_engine() as engine:
                settings = ServeSettings(port=self._port, **self._settings)
                async with Server(engine, settings) as server:
                    self._server, self._port = server, server.port
                    started.set_result(None)
                    await self._leave.wait()
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)


class ScriptedServer(PageServer):
    """A server whose model says what the test wants, one step at a time where it is held.

    Args:
        answers: of `ScriptedBackend`; a function is called with the prompt's text.
        is_held: whether steps wait for `gate`.
        max_new_tokens: the model's default.
        codec: of the model's texts.
        about: fields of ModelInfo that differ from those of scripted models.
        settings: as of `ServeSettings`.
    """

    def __init__(
        self,
        answers: str | Callable[[str], str] = fakes.ANSWER,
        *,
        is_held: bool = True,
        max_new_tokens: int = 128,
        codec: ByteCodec | None = None,
        about: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.gate = StepGate()
        self._answers = answers
        self._is_held = is_held
        self._defaults = fakes.params(max_new_tokens=max_new_tokens)
        self._codec = codec or ByteCodec()
        self._info = fakes.info(**(about or {}))
        super().__init__(self._make_scripted, **settings)

    @property
    def prompts(self) -> list[str]:
        """The prompts that the model read."""
        windows = [row.window for rows in self._backend.batches for row in rows]
        first = [window for window in windows if window.start == 0]
        prompts = [ByteCodec().decode(window.tokens[: window.num_to_cache]) for window in first]
        return list(dict.fromkeys(prompts))

    @property
    def block_sizes(self) -> set[int]:
        """Of the answer's blocks that were denoised."""
        windows = [row.window for rows in self._backend.batches for row in rows]
        return {b - a for window in windows for a, b in pairwise(window.block_stops)}

    def __exit__(self, *_: object) -> None:
        self.gate.open()
        super().__exit__()

    def _answer(self, prompt: tuple[int, ...]) -> bytes:
        answers = self._answers
        text = answers if isinstance(answers, str) else answers(ByteCodec().decode(prompt))
        return text.encode()

    def _make_scripted(self) -> LocalEngine:
        self.gate = StepGate()
        gate = self.gate if self._is_held else None
        self._backend = ScriptedBackend(self._answer, info=self._info, gate=gate)
        return LocalEngine.over(self._backend, self._codec, defaults=self._defaults)
