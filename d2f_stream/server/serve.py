"""serve: a server in a process of its own, from its ready line to its exit code.

Owns signals and logging, which a command line wants; `Server` itself runs inside any event loop.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Iterator
from typing import NoReturn

from d2f_stream.core.errors import D2FError
from d2f_stream.core.session import Engine
from d2f_stream.server.listening.sockets import raise_file_limit
from d2f_stream.server.peer_log import OneLine
from d2f_stream.server.server import Server
from d2f_stream.server.settings import ServeSettings

__all__ = ["ServeSettings", "Server", "configure_logging", "serve"]

logger = logging.getLogger("d2f_stream.server")


async def serve(engine: Engine, settings: ServeSettings) -> int:
    """Serve until SIGINT or SIGTERM; return the exit code: 0 after an orderly end.

    A second signal ends at once what the first has left running; the code then names that signal,
    as shells do it: 128 and its number. Where a step hangs, so that the engine could not be closed,
    this does not return: the process ends, with that code, or with 1.

    Raises:
        EngineFailed: the engine failed, and is not loaded again.
        AddressUnavailable: the address is in use, or is not this machine's.
    """
    raise_file_limit()
    with _signals() as signals:
        async with Server(engine, settings) as server:
            _say_ready(engine, server)
            try:
                if await _first(signals.get(), server.wait_failed()) is None:
                    raise RuntimeError("the server stopped by itself")
            except D2FError:
                await server.shut_down(0.0)  # whoever failed with the engine still hears of it
                raise
            deadline_s = settings.shutdown_deadline_s
            logger.info(
                "shutting down: %d streams have %g s to end; a second signal ends them now",
                server.registry.num_active,
                deadline_s,
            )
            hurried = await _first(signals.get(), server.shut_down(deadline_s))
    code = 0 if hurried is None else 128 + hurried
    if server.registry.num_abandoned:
        logger.error("a step of the model hangs; the process ends without it")
        _end_process(code or 1)
    return code


def _end_process(code: int) -> NoReturn:
    """End the process now, whatever its threads do."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


async def _first(signalled: Awaitable[int], work: Awaitable[None]) -> int | None:
    """Wait for either and cancel the other; return the signal that came, None where none did."""
    tasks = asyncio.ensure_future(signalled), asyncio.ensure_future(work)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        came, done = tasks
        if done.done():
            done.result()
        return came.result() if came.done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


@contextlib.contextmanager
def _signals() -> Iterator["asyncio.Queue[int]"]:
    loop = asyncio.get_running_loop()
    came: asyncio.Queue[int] = asyncio.Queue()  # bounded by the patience of a person

    def note(number: int, frame: object) -> None:
        loop.call_soon_threadsafe(came.put_nowait, number)

    # Not loop.add_signal_handler, which Windows lacks.
    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def configure_logging(level: str = "info") -> None:
    """Write what the SDK and uvicorn log to standard error; for command lines. Idempotent.

    Args:
        level: debug, info, warning or error.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("d2f_stream", "uvicorn"):
        ours = logging.getLogger(name)
        if not any(isinstance(old, logging.StreamHandler) for old in ours.handlers):
            ours.addHandler(handler)
    logging.getLogger("d2f_stream").setLevel(level.upper())


def _say_ready(engine: Engine, server: Server) -> None:
    device = getattr(engine.info, "device", "")
    where = f" on {device}" if device else ""
    sys.stdout.write(
        f"d2f-stream serves {engine.info.name}{where} at {server.url} (stop with Ctrl-C)\n"
    )
    sys.stdout.flush()
