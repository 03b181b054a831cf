"""HandleEngine: an engine whose replicas are elsewhere, reached by calls. Knows nothing of Ray.

A replica that is lost is replaced by another one, which goes on behind the blocks that were told:
nothing is asked twice. Where servers share a log, a call carries no events: the replica appends
them to the log, and whoever reads does so from there (`LoggingHandleEngine`).
"""

import asyncio
from collections.abc import Sequence
from typing import Final, Self, Unpack

import msgspec

from d2f_stream.channels.patience import patient_timeout
from d2f_stream.client.remote import RemoteStream, new_request
from d2f_stream.cluster.attempts import Attempts
from d2f_stream.cluster.calls import Calls, ReplicaLost
from d2f_stream.cluster.conversations import ReadPrompt, beginning_of, key_of
from d2f_stream.cluster.orders import (
    AnswerOrder,
    PromptOrder,
    encode,
    ids_of,
    read_facts,
    read_told,
    seeded,
)
from d2f_stream.core.buffer import EventBuffer
from d2f_stream.core.errors import (
    ConnectionLost,
    D2FError,
    EngineClosed,
    EngineFailed,
    PromptTooLong,
)
from d2f_stream.core.events import Block, StreamNames
from d2f_stream.core.params import GenerationParams, ParamOverrides
from d2f_stream.core.session import Prompt, Session
from d2f_stream.wire.protocol import ModelCard, wire_prompt

__all__ = ["HandleEngine"]

CONNECT_S: Final = 60.0
"""For a replica to tell what it serves; one that loads its model is not asked before."""


class HandleEngine:
    """An engine over replicas; an async context manager. Belongs to one event loop.

    Args:
        calls: how replicas are reached; closed with the engine.
    """

    logs = False

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._card: ModelCard | None = None
        self._keeps_turns = False
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def info(self) -> ModelCard:
        """Facts about the model, once the engine was entered."""
        if self._card is None:
            raise RuntimeError("no replica has been asked yet; enter the engine with `async with`")
        return self._card

    @property
    def defaults(self) -> GenerationParams:
        """The parameters of a request that gives none."""
        return self.info.params

    @property
    def usable(self) -> bool:
        """Whether requests are accepted."""
        return not self._closing

    def check_size(self, prompt: Prompt) -> None:
        """Refuse token ids that are too many; only a replica can tell how many a text has."""
        is_ids = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], int)
        if is_ids and len(prompt) > self.info.max_len:
            raise PromptTooLong(len(prompt), 1, self.info.max_len)

    async def encode(self, prompt: Prompt, *, raw: bool = True) -> list[int]:
        """Return a prompt's ids, which generate() takes for it. Safe to cancel.

        Raises:
            InvalidPrompt: it is of no kind that is known, or its template refuses it.
            PromptTooLong: the model cannot hold it.
        """
        self._check_open()
        data = encode(PromptOrder(prompt=wire_prompt(prompt), raw=raw))
        attempts = Attempts("a prompt")
        while True:
            try:
                ids = ids_of(await self._calls.call("encode", data))
                return ReadPrompt(ids, beginning_of(prompt, raw=raw))
            except ReplicaLost as lost:
                await attempts.lost(lost)

    def generate(
        self,
        prompt: Prompt,
        params: GenerationParams | None = None,
        *,
        names: StreamNames | None = None,
        committed: Sequence[Block] = (),
        raw: bool = True,
        **overrides: Unpack[ParamOverrides],
    ) -> Session:
        """Start a request; the session streams its answer.

        Args:
            prompt: chat messages, for the model's template; a string; or token ids.
            params: instead of the model's defaults.
            names: that the events carry.
            committed: the blocks that another engine has told of this request, from the first on.
            raw: take a string verbatim, as a text to be continued; else it is a user's turn.
            overrides: single fields, on top of either.

        Raises:
            InvalidRequest: parameters do not fit the model. What only a replica can tell, the
                session's first await raises.
            EngineClosed: the engine was closed.
        """
        self._check_open()
        given = names or StreamNames.fresh()
        request = new_request(prompt, params, overrides, defaults=self.defaults, raw=raw)
        fields = seeded(request.params, self.defaults)
        request = msgspec.structs.replace(request, request_id=given.request, params=fields)
        cancelled = asyncio.Event()
        buffer = EventBuffer(cancel=cancelled.set, committed=committed)
        stream = RemoteStream(request, buffer)
        if committed:
            stream.stream_id, stream.last_seq = given.stream, len(committed)
        order = AnswerOrder(request=request, names=given, committed=tuple(committed))
        key = self._key_of(prompt, scope=given.scope, raw=raw)
        task = asyncio.create_task(
            self._run(order, stream, cancelled, key), name=f"d2f-handle-{given.stream}"
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return Session(buffer)

    async def __aenter__(self) -> Self:
        """Ask a replica what it serves. Safe to cancel.

        Raises:
            ConnectionLost: no replica answered in time.
            D2FError: it cannot be worked with.
        """
        why: Exception | None = None
        attempts = Attempts("the question what is served")
        try:
            async with patient_timeout(CONNECT_S):
                while True:
                    try:
                        facts = await self._calls.call("facts", b"")
                        break
                    except ReplicaLost as lost:
                        why = lost
                        await attempts.lost(lost)
        except TimeoutError:
            await self._calls.close()
            raise ConnectionLost(
                f"no engine answered within {CONNECT_S:g} s"
                f"{f': {why}' if why else ', they may be loading or busy'}; "
                "look at `serve status`"
            ) from why
        try:
            told = read_facts(facts, logs=self.logs)
        except D2FError:
            await self._calls.close()
            raise
        self._card, self._keeps_turns = told.card, told.keeps_turns
        return self

    async def __aexit__(self, *exc: object) -> None:
        """End all sessions. Streams of a log go on without this process."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))
        await self._calls.close()

    def _check_open(self) -> None:
        if self._closing:
            raise EngineClosed("the engine was closed; connect again")

    def _key_of(self, prompt: Prompt, *, scope: str, raw: bool) -> str:
        """Return the key of a prompt's conversation, where that helps any replica."""
        if not self._keeps_turns:
            return ""
        return key_of(beginning_of(prompt, raw=raw), scope=scope)

    async def _run(
        self, order: AnswerOrder, stream: RemoteStream, cancelled: asyncio.Event, key: str
    ) -> None:
        """Bring an answer to its end, and a cancelled one to the end that readers wait for."""
        answer = asyncio.create_task(self._answer(order, stream, key))
        gone = asyncio.create_task(cancelled.wait())
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (answer, gone):
                task.cancel()
            await asyncio.wait((answer, gone))
            if cancelled.is_set():
                stream.end_cancelled()
            elif answer.cancelled():
                stream.fail(EngineClosed("the engine was closed"))
            elif (error := answer.exception()) is not None:
                stream.fail(error if isinstance(error, D2FError) else EngineFailed(repr(error)))

    async def _answer(self, order: AnswerOrder, stream: RemoteStream, key: str) -> None:
        blocks, model = list(order.committed), order.model
        attempts = Attempts(f"stream {order.names.stream}")
        while True:
            asked = msgspec.structs.replace(order, committed=tuple(blocks), model=model)
            try:
                answers = self._calls.stream("answer", encode(asked), conversation=key)
                async for data in answers:
                    told = read_told(data)
                    model = told.model
                    for event in told.events:
                        if isinstance(event, Block) and event.index == len(blocks):
                            blocks.append(event)
                        stream.receive(event)
                return
            except ReplicaLost as lost:
                await attempts.lost(lost)
            except (EngineFailed, EngineClosed) as error:
                key = ""  # whoever failed is still there until Serve has replaced it
                await attempts.failed(error)
