"""LoggingHandleEngine: an engine over replicas that append to the log which this server reads."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Final

import msgspec

from d2f_stream.cluster.attempts import Attempts
from d2f_stream.cluster.calls import ReplicaLost
from d2f_stream.cluster.handle_engine import HandleEngine
from d2f_stream.cluster.orders import WorkOrder, encode, raise_refusal, seeded
from d2f_stream.core.errors import EngineClosed, EngineFailed
from d2f_stream.core.events import StreamNames
from d2f_stream.server.streams.admission import Measured
from d2f_stream.wire.protocol import Overrides, wire_prompt

__all__ = ["LoggingHandleEngine"]

LAST_WORDS_S: Final = 1.0
"""For a replica's answer, once its stream has ended."""


class LoggingHandleEngine(HandleEngine):
    """A `HandleEngine` whose replicas append to the log that this server reads.

    A `LoggingEngine`, as servers know it.
    """

    logs = True

    async def work(
        self,
        names: StreamNames,
        asked: Measured,
        *,
        max_prompt_tokens: int | None,
        is_deserted: Callable[[], Awaitable[bool]],
    ) -> None:
        """Have a replica bring the stream to its end, from where the log has it. Safe to cancel.

        Returns once the stream has ended or another worker has it. The work of a replica that is
        lost is given to another one, whether the call breaks off or the lease runs out: where a
        machine vanishes with its sockets open, no call to it ends.

        Raises:
            D2FError: the request is refused, or one engine after the other has failed with it.
        """
        self._check_open()
        key = self._key_of(asked.prompt, scope=names.scope, raw=asked.raw)
        order = WorkOrder(
            stream=names.stream,
            prompt=wire_prompt(asked.prompt),
            raw=asked.raw,
            params=seeded(msgspec.convert(asked.overrides, Overrides), self.defaults),
            clamp=asked.clamp,
            max_prompt_tokens=max_prompt_tokens,
        )
        attempts = Attempts(f"stream {names.stream}")
        doubts = False
        while True:
            try:
                call = self._calls.work(encode(order), conversation=key, doubts=doubts)
                data = await _unless_deserted(call, is_deserted())
                raise_refusal(data)
            except _Deserted as lost:
                doubts = True
                await attempts.lost(lost)
            except ReplicaLost as lost:
                order = msgspec.structs.replace(order, by_force=True)
                await attempts.lost(lost)
            except (EngineFailed, EngineClosed) as error:
                key = ""  # whoever failed is still there until Serve has replaced it
                await attempts.failed(error)
            else:
                return


class _Deserted(Exception):
    """A replica's lease has run out while it was thought to work, or it never took it."""


async def _unless_deserted(
    call: Coroutine[None, None, bytes], is_deserted: Awaitable[bool]
) -> bytes:
    """Return a call's answer. Safe to cancel.

    Raises:
        ReplicaLost: the replica is gone, and said so or ended the stream before.
        _Deserted: it does not hold the stream's lease.
    """
    calling = asyncio.create_task(call, name="d2f-work-call")
    watching = asyncio.ensure_future(is_deserted)
    try:
        await asyncio.wait((calling, watching), return_when=asyncio.FIRST_COMPLETED)
        if not calling.done():
            if watching.result():
                raise _Deserted("nobody has its lease")
            await asyncio.wait((calling,), timeout=LAST_WORDS_S)
        return calling.result() if calling.done() else b""
    finally:
        for task in (calling, watching):
            task.cancel()
        await asyncio.gather(calling, watching, return_exceptions=True)
