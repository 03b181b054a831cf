"""LoggingHandleEngine: an engine over replicas that append to the log which this server reads."""

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


class LoggingHandleEngine(HandleEngine):
    """A `HandleEngine` whose replicas append to the log that this server reads.

    A `LoggingEngine`, as servers know it.
    """

    logs = True

    async def work(
        self, names: StreamNames, asked: Measured, *, max_prompt_tokens: int | None
    ) -> None:
        """Have a replica bring the stream to its end, from where the log has it. Safe to cancel.

        Returns once the stream has ended or another worker has it; the work of a replica that is
        lost is given to another one.

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
        while True:
            try:
                data = await self._calls.call("work", encode(order), conversation=key)
                raise_refusal(data)
            except ReplicaLost as lost:
                order = msgspec.structs.replace(order, by_force=True)
                await attempts.lost(lost)
            except (EngineFailed, EngineClosed) as error:
                key = ""  # whoever failed is still there until Serve has replaced it
                await attempts.failed(error)
            else:
                return
