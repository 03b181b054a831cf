"""Store: the connection to a Valkey or Redis server on which all of a process's commands go.

What is asked while an answer is on its way goes out together, so that under load many commands
share one round trip. Where the connection breaks, what was not answered is asked again: every
command here may run twice.
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Final

from d2f_stream.channels.ending import end_tasks
from d2f_stream.channels.patience import patient_timeout
from d2f_stream.core.errors import LogUnavailable
from d2f_stream.server.streams.valkey.connecting import (
    ANSWER_S,
    BACKOFF_S,
    LOST,
    AbstractConnection,
    address_of,
    check_server,
    exceptions,
    open_connection,
    passing_of,
    pool_of,
    sentence_of,
)
from d2f_stream.server.streams.valkey.scripts import LAYOUT, OTHER_LAYOUT, SCRIPTS, Script

__all__ = ["Argument", "LogFull", "Reply", "Store"]

logger = logging.getLogger("d2f_stream.server")

Reply = int | bytes | None | list["Reply"]
Argument = str | bytes | int

CLOSE_S: Final = 1.0
MAX_BATCH: Final = 512
LOOK_S: Final = 0.25
"""Between two looks at what waits for an answer; a stall of this process costs it no more."""


class LogFull(LogUnavailable):
    """The store has no room."""


class Store:
    """Commands to a store. Belongs to one event loop.

    Args:
        url: valkey://, valkeys:// (TLS), redis:// or rediss://, with user, password and database.

    Raises:
        InvalidRequest: the URL cannot be used.
    """

    def __init__(self, url: str) -> None:
        self.pool = pool_of(url)  # first, as it tells what the URL lacks
        self.address = address_of(url)
        self._connection: AbstractConnection | None = None
        self._waiting: list[_Call] = []
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._problem = "cannot be reached: no answer yet"
        self._connected_at: float | None = None
        self._asked: set[_Call] = set()  # whose answers somebody waits for
        self._timer: asyncio.TimerHandle | None = None

    @property
    def database(self) -> int:
        """Its number."""
        return int(self.pool.connection_kwargs.get("db", 0))

    @property
    def healthy_s(self) -> float:
        """For how long it has been answering, seconds; 0 where it does not."""
        if self._connected_at is None:
            return 0.0
        return asyncio.get_running_loop().time() - self._connected_at

    async def open(self) -> None:
        """Connect, and check what answers. Safe to cancel.

        Raises:
            LogUnavailable: nothing answers, or not what can be used.
        """
        try:
            async with patient_timeout(ANSWER_S):
                await self._connect()
                assert self._connection is not None
                await check_server(self._connection, self.address)
        except (*LOST, exceptions.ValkeyError) as error:
            await self._disconnect()
            raise LogUnavailable(
                f"the log at {self.address} cannot be used: {sentence_of(error)}"
            ) from error
        except LogUnavailable:
            await self._disconnect()
            raise
        self._task = asyncio.create_task(self._serve(), name="d2f-log-commands")

    async def close(self) -> None:
        """Send what was posted, for a short while, and disconnect."""
        if self._task is not None:
            with contextlib.suppress(LogUnavailable):
                await self.run("PING", patience_s=CLOSE_S)
            await end_tasks(self._task)
        await self._disconnect()

    async def run(self, *command: Argument, patience_s: float) -> Reply:
        """Return what the store answers. Safe to cancel; it may have been done all the same.

        Raises:
            LogFull: the store has no room.
            LogUnavailable: it did not answer for so long, or refuses.
        """
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        call = _Call(command, answer, left_s=patience_s + LOOK_S)  # the first may come at once
        self._waiting.append(call)
        self._wake.set()
        self._asked.add(call)
        if self._timer is None:
            self._look_later()
        try:
            return await answer
        finally:
            self._asked.discard(call)

    def post(self, *command: Argument, is_lossy: bool = False) -> None:
        """Send a command whose answer nobody needs; a lossy one only while the store answers."""
        if self._connected_at is not None or not is_lossy:
            self._waiting.append(_Call(command, None))
            self._wake.set()

    def post_script(self, script: Script, *arguments: Argument) -> None:
        """Run a script whose answer nobody needs."""
        self.post("EVALSHA", script.sha, 0, *arguments)

    async def script(self, script: Script, *arguments: Argument, patience_s: float) -> Reply:
        """Return what a script answers; as `run`."""
        return await self.run("EVALSHA", script.sha, 0, *arguments, patience_s=patience_s)

    def _look_later(self) -> None:
        """Look for calls that are due: a timer for each costs as much as all the rest."""
        self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)

    def _look(self) -> None:
        self._timer = None
        for call in self._asked:
            call.left_s -= LOOK_S
            if call.left_s <= 0:
                call.refuse(LogUnavailable(f"the log at {self.address} {self._problem}"))
        if any(not call.is_over for call in self._asked):
            self._look_later()

    async def _serve(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                batch = [call for call in self._waiting[:MAX_BATCH] if not call.is_over]
                del self._waiting[:MAX_BATCH]
                try:
                    async with patient_timeout(ANSWER_S):
                        again = await self._exchange(batch)
                    if again:
                        self._waiting[:0] = again
                        await asyncio.sleep(BACKOFF_S[1])
                except (*LOST, exceptions.ValkeyError) as error:
                    self._waiting[:0] = batch
                    await self._reconnect(error)

    async def _exchange(self, batch: "Sequence[_Call]") -> "list[_Call]":
        """Send commands and note their answers; return those to be sent again."""
        connection, again = self._connection, []
        if connection is None:
            raise exceptions.ConnectionError("not connected")
        packed = b"".join([call.packed for call in batch])
        await connection.send_packed_command(packed, check_health=False)
        needs_scripts = False
        for call in batch:
            try:
                answer = await connection.read_response()
            except exceptions.NoScriptError:
                needs_scripts = True  # the store was restarted, or told to forget them
                again.append(call)
            except exceptions.ResponseError as error:
                if passing_of(error) is not None:
                    self._note_problem(error)
                    again.append(call)
                else:
                    call.refuse(self._refusal_of(error))
            else:
                call.note(answer)
        if needs_scripts:
            await self._load_scripts(connection)
        return again

    async def _reconnect(self, error: Exception) -> None:
        logger.warning("the log at %s is lost: %s", self.address, sentence_of(error))
        number = 0
        while True:
            self._connected_at = None
            self._note_problem(error)
            await self._disconnect()
            await asyncio.sleep(BACKOFF_S[min(number, len(BACKOFF_S) - 1)])
            number += 1
            try:
                async with patient_timeout(ANSWER_S):
                    await self._connect()
            except (*LOST, exceptions.ValkeyError) as later:
                error = later
                continue
            logger.warning("the log at %s is back", self.address)
            return

    async def _connect(self) -> None:
        self._connection = await open_connection(self.pool)
        await self._load_scripts(self._connection)
        self._connected_at = asyncio.get_running_loop().time()

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(*LOST):
                await connection.disconnect(nowait=True)

    async def _load_scripts(self, connection: AbstractConnection) -> None:
        loads = connection.pack_commands([("SCRIPT", "LOAD", script.text) for script in SCRIPTS])
        await connection.send_packed_command(loads, check_health=False)
        for _ in SCRIPTS:
            await connection.read_response()

    def _note_problem(self, error: Exception) -> None:
        what = "cannot be reached" if passing_of(error) is None else "takes nothing now"
        self._problem = f"{what}: {sentence_of(error)}"

    def _refusal_of(self, error: Exception) -> LogUnavailable:
        if isinstance(error, exceptions.OutOfMemoryError) or "OOM " in str(error):
            return LogFull(
                f"the log at {self.address} is full; raise its maxmemory, or keep ended answers "
                "for a shorter time"
            )
        if str(error).startswith(OTHER_LAYOUT):
            return LogUnavailable(
                f"the log at {self.address} is of another version of d2f_stream "
                f"(here its layout is {LAYOUT!r}); give each its own database"
            )
        return LogUnavailable(f"the log at {self.address} refuses a command: {sentence_of(error)}")


class _Call:
    __slots__ = ("answer", "left_s", "packed")

    def __init__(
        self,
        command: tuple[Argument, ...],
        answer: "asyncio.Future[Reply] | None",
        *,
        left_s: float = 0.0,
    ) -> None:
        # Packed here: what cannot be is the caller's error, not that of all who share a batch. The
        # library's own way takes four times as long.
        parts = [str(p).encode() if not isinstance(p, bytes) else p for p in command]
        pieces = (b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
        self.packed = b"*%d\r\n%b" % (len(parts), b"".join(pieces))
        self.answer = answer
        self.left_s = left_s  # of its asker's patience

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.answer is not None and self.answer.done()

    def note(self, answer: Reply) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_result(answer)

    def refuse(self, error: LogUnavailable) -> None:
        if self.answer is None:
            logger.warning("%s", error)
        elif not self.answer.done():
            self.answer.set_exception(error)
