"""A log, servers over it, and a port that leads to one of them: a cluster beside its engines."""

import asyncio
import contextlib
import os
import shutil
import socket
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["Balancer", "ServerProcess", "open_store", "start_server"]

START_S: Final = 60.0
CHUNK: Final = 65_536


@dataclass(frozen=True)
class ServerProcess:
    """A `d2f-stream serve`."""

    process: Process
    port: int

    async def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()


async def start_server(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> ServerProcess:
    """Start a server on a free port; wait until it is ready.

    Raises:
        RuntimeError: it ended.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "d2f_stream", "serve", "--port", "0", *arguments),
        stdout=PIPE,
        stderr=DEVNULL,
        env={**os.environ, **(environment or {})},
    )
    assert process.stdout is not None
    async with asyncio.timeout(START_S):
        line = (await process.stdout.readline()).decode()
    if "127.0.0.1:" not in line:
        raise RuntimeError(f"the server said {line!r}")
    return ServerProcess(process, int(line.split("127.0.0.1:")[1].split()[0]))


@asynccontextmanager
async def open_store() -> AsyncIterator[str]:
    """Run a Valkey or Redis server that writes to disk each second; yield its URL."""
    program = shutil.which("valkey-server") or shutil.which("redis-server")
    if program is None:
        raise RuntimeError("neither valkey-server nor redis-server is installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "store.conf"
        config.write_text(
            f'port {port}\nbind 127.0.0.1\ndir {folder}\nsave ""\nappendonly yes\n'
            "appendfsync everysec\n"
        )
        process = await asyncio.create_subprocess_exec(program, str(config), stdout=DEVNULL)
        try:
            yield f"valkey://127.0.0.1:{port}"
        finally:
            process.kill()
            await process.wait()


class Balancer:
    """A port that leads to whichever server is named, as a balancer before them would."""

    def __init__(self) -> None:
        self.target = 0
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator["Balancer"]:
        """Listen while the context is open."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
            pumps = [
                asyncio.ensure_future(_pump(reader, back)),
                asyncio.ensure_future(_pump(there, writer)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
                back.transport.abort()
        writer.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()
