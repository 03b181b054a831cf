"""The functions of d2f_stream for programs without an event loop: the same names, without await.

    from d2f_stream import sync

    for block in sync.generate("What is the capital of Japan?"):
        print(block.text, end="", flush=True)

Owns one event loop, in one thread of the process, which starts with the first call and ends with
the process; all calls of all threads share it, so that their requests share the steps of a model.
A forked process gets a loop of its own; sessions and engines that it inherited say that they are
its parent's.
"""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Self, TypedDict, TypeVar, Unpack

from d2f_stream import api
from d2f_stream.background import Background, shared_background, stop_first
from d2f_stream.core.events import Block, Event
from d2f_stream.core.limits import Limits
from d2f_stream.core.params import GenerationParams, ParamOverrides
from d2f_stream.core.session import Engine as AsyncEngine
from d2f_stream.core.session import EngineInfo, Prompt, Result
from d2f_stream.core.session import Session as AsyncSession

__all__ = ["Engine", "LoadOptions", "Session", "connect", "generate", "load"]

Value = TypeVar("Value")


class LoadOptions(TypedDict, total=False):
    """The keyword arguments of load(), which are those of `d2f_stream.load`."""

    adapter: str | Path | None
    backend: str
    quantization: str
    device: str
    kv_tokens: int | None
    family: str | None
    limits: Limits | None
    warm_up: bool
    token: str | None


class Session:
    """An answer in progress: an iterator of its blocks, and a context manager.

    Leaving `with session`, `cancel()` and letting go of the last reference give the answer up, and
    so do `break`, an error and Ctrl-C in `for block in generate(...)`, whose loop holds the only
    reference. One thread reads at a time.
    """

    def __init__(self, background: "Background", session: AsyncSession) -> None:
        self._background = background
        self._session = session

    @property
    def text(self) -> str:
        """The text committed so far, read or not."""
        return self._session.text

    def cancel(self) -> None:
        """Give the answer up; its slot is free within one step. Idempotent; from any thread."""
        self._session.cancel()

    def result(self) -> Result:
        """Wait for the whole answer. Ctrl-C ends the wait, not the answer.

        Raises:
            D2FError: the request was turned away, or its stream failed.
        """
        return self._background.run(self._session.result())

    def events(self) -> Iterator[Event]:
        """Iterate over every event: StreamStarted, blocks, drafts where asked for, and the end.

        A stream that fails ends with StreamFailed and raises nothing.
        """
        events = self._session.events()
        while (event := self._background.run(_next(events))) is not None:
            yield event

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Block:
        """Wait for the next block. Ctrl-C ends the wait; no event is lost.

        Raises:
            D2FError: the request was turned away, or its stream failed.
        """
        try:
            block = self._background.run(_next(self._session))
        finally:
            # The traceback of an interrupted read keeps this frame; it must not keep the session.
            del self
        if block is None:
            raise StopIteration
        return block

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Cancel, and wait until the slot is free."""
        self._background.run(self._session.__aexit__(*exc))


class Engine:
    """An open engine; its requests are waited for by whoever reads them, in any thread."""

    def __init__(self, background: "Background", engine: AsyncEngine) -> None:
        self._background = background
        self._engine = engine

    @property
    def info(self) -> EngineInfo:
        """Facts about the model."""
        return self._engine.info

    @property
    def defaults(self) -> GenerationParams:
        """The parameters of a request that gives none."""
        return self._engine.defaults

    def generate(
        self,
        prompt: Prompt,
        params: GenerationParams | None = None,
        *,
        raw: bool = True,
        **overrides: Unpack[ParamOverrides],
    ) -> Session:
        """Start a request; the session streams its answer.

        The arguments are those of an asynchronous engine: a string is taken as it is, unless
        raw=False.
        """
        start = partial(self._engine.generate, prompt, params, raw=raw, **overrides)
        return _session(self._background, start)


def generate(
    prompt: Prompt,
    *,
    model: str | Path | Engine | None = None,
    params: GenerationParams | None = None,
    raw: bool = False,
    **overrides: Unpack[ParamOverrides],
) -> Session:
    """Start an answer; the session streams it. The arguments are those of `d2f_stream.generate`.

    Raises:
        D2FError: as `d2f_stream.generate`; what that raises from a session's first await is raised
            by the first read here.
    """
    if isinstance(model, Engine):
        return model.generate(prompt, params, raw=raw, **overrides)
    start = partial(api.generate, prompt, model=model, params=params, raw=raw, **overrides)
    return _session(shared_background(), start)


@contextlib.contextmanager
def load(model: str | Path | None = None, **options: Unpack[LoadOptions]) -> Iterator[Engine]:
    """Load a model and open an engine over it; leaving the context ends its sessions.

    Args:
        model: as of `d2f_stream.load`.
        options: as of `d2f_stream.load`.

    Raises:
        D2FError: as `d2f_stream.load`.
    """
    with _opened(partial(api.load, model, **options)) as engine:
        yield engine


@contextlib.contextmanager
def connect(
    url: str, *, token: str | None = None, reconnect_timeout_s: float = 30.0
) -> Iterator[Engine]:
    """Open an engine whose model is on a server; leaving the context ends its sessions.

    Args:
        url: as of `d2f_stream.connect`, like the others.
        token: of a server that asks for one.
        reconnect_timeout_s: how long a server that was lost is tried.

    Raises:
        D2FError: as `d2f_stream.connect`.
    """
    with _opened(
        partial(api.connect, url, token=token, reconnect_timeout_s=reconnect_timeout_s)
    ) as engine:
        yield engine


def _session(background: Background, start: Callable[[], AsyncSession]) -> Session:
    async def on_the_loop() -> AsyncSession:
        return start()

    try:
        return Session(background, background.run(on_the_loop()))
    finally:
        stop_first()


@contextlib.contextmanager
def _opened(opening: Callable[[], AbstractAsyncContextManager[AsyncEngine]]) -> Iterator[Engine]:
    background = shared_background()
    context = opening()
    engine = background.run(_enter(context))
    stop_first()
    try:
        yield Engine(background, engine)
    finally:
        background.run(_leave(context))


async def _enter(context: AbstractAsyncContextManager[AsyncEngine]) -> AsyncEngine:
    return await context.__aenter__()


async def _leave(context: AbstractAsyncContextManager[AsyncEngine]) -> None:
    await context.__aexit__(None, None, None)


async def _next(iterator: AsyncIterator[Value]) -> Value | None:
    return await anext(iterator, None)
