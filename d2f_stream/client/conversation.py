"""Conversation: what a client has asked of a server, and what it has to say next. Pure.

Knows requests, messages and whether a connection is there; nothing of channels, tasks or time.
Operations are pulled (`next_operation`), messages are pushed (`receive`). It survives its
connections: on a new one (`opened`) it asks to read on what had started, and asks again for what
had not, under the same request id, so that nothing is started twice.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

from d2f_stream.client.remote import RemoteStream
from d2f_stream.core.buffer import EventBuffer
from d2f_stream.core.errors import D2FError, LimitExceeded, StreamLost, error_from
from d2f_stream.core.events import (
    Block,
    Draft,
    StreamFailed,
    StreamFinished,
    StreamNames,
    StreamStarted,
)
from d2f_stream.wire.codec import JSON
from d2f_stream.wire.protocol import (
    Cancel,
    Generate,
    Operation,
    RequestRejected,
    Resume,
    ServerClosing,
    ServerHello,
    ServerMessage,
)

__all__ = ["Conversation"]

logger = logging.getLogger("d2f_stream.client.websocket_engine")


@dataclass(slots=True, eq=False)
class _Asked:
    """A request that the server has not ended.

    Attributes:
        reached: whether the server may know of it.
        cancelled: whether nobody reads it any more.
        resumed_after: what was asked for again on this connection, because an event was missing.
        served_as: the server's name of the stream; known even where its reader has gone before.
    """

    stream: RemoteStream
    reached: bool = False
    cancelled: bool = False
    resumed_after: int | None = None
    served_as: str | None = None


class Conversation:
    """The requests of one client, over all its connections.

    Attributes:
        up: whether the server has said hello on a connection that is not known to be broken.
        hello: what it said last; None before the first time.
        closing: what it said, if it shuts down.

    Args:
        changed: called when there is something to send, or when a request has ended.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self.up = False
        self.hello: ServerHello | None = None
        self.closing: ServerClosing | None = None
        self._changed = changed
        self._asked: dict[str, _Asked] = {}  # by request id, in order
        self._by_stream: dict[str, _Asked] = {}
        self._outbox: deque[Operation] = deque()
        self._owed: dict[str, Cancel] = {}  # by request id: for streams that ended on this side

    @property
    def busy(self) -> bool:
        """Whether a connection is needed."""
        return bool(self._asked or self._owed)

    # The reader's side: requests come and are given up.

    def ask(self, request: Generate, buffer: EventBuffer, names: StreamNames | None = None) -> None:
        """Take a request on; `buffer` gets its events."""
        self._asked[request.request_id] = _Asked(RemoteStream(request, buffer, names))
        if self.up:
            self._post(request)
        else:
            self._changed()

    def cancel(self, request_id: str) -> None:
        """Give a request up. Idempotent.

        The server ends it where it can be told. Otherwise it ends here and now, and the server is
        told later.
        """
        asked = self._asked.get(request_id)
        if asked is None or asked.cancelled:
            return
        asked.cancelled = True
        if not asked.reached:
            self._end_here(asked)
        elif self.up:
            self._post(self._cancel_of(asked))
        else:
            self._owe(asked)
            self._end_here(asked)

    def abandon(self, error: D2FError) -> None:
        """Let every reader see `error` at once, and have the server end what it runs."""
        for request_id, asked in list(self._asked.items()):
            asked.stream.fail(error)
            self.cancel(request_id)

    def fail(self, error: D2FError) -> None:
        """End everything on this side; nothing more is sent."""
        self._outbox.clear()
        self._owed.clear()
        for asked in list(self._asked.values()):
            asked.stream.fail(error)
            self._settle(asked)

    def fail_unanswered(self, error: D2FError) -> None:
        """End the requests that may have reached the server and got no answer."""
        for asked in self._unanswered():
            asked.stream.fail(error)
            self._settle(asked)

    def fail_largest(self, error: D2FError) -> None:
        """End the largest of the requests that got no answer; nothing where there is none."""
        unanswered = self._unanswered()
        if unanswered:
            asked = max(unanswered, key=lambda asked: len(JSON.encode(asked.stream.request)))
            asked.stream.fail(error)
            self._settle(asked)

    # The connection's side.

    def opened(self, hello: ServerHello) -> None:
        """Note that a connection is there: read on, ask again, and cancel what is owed."""
        self.hello, self.up = hello, True
        self._outbox.extend(self._owed.values())
        for asked in self._asked.values():
            stream = asked.stream
            self._outbox.append(self._resume_of(asked) if stream.started else stream.request)
        self._changed()

    def broken(self) -> None:
        """Note that the connection is gone. What was cancelled on it ends here."""
        self.up, self.closing = False, None
        self._outbox.clear()
        for asked in list(self._asked.values()):
            asked.resumed_after = None
            if asked.cancelled:
                self._owe(asked)
                self._end_here(asked)

    def next_operation(self) -> Operation | None:
        """Take what is to be sent next; None where there is nothing now."""
        if not self._outbox:
            return None
        operation = self._outbox.popleft()
        if isinstance(operation, Generate):
            self._asked[operation.request_id].reached = True
        elif isinstance(operation, Cancel):
            self._owed = {name: owed for name, owed in self._owed.items() if owed is not operation}
        return operation

    def receive(self, message: ServerMessage) -> None:
        """Take what the server sent."""
        match message:
            case StreamStarted():
                asked = self._asked.get(message.request_id)
                if asked is not None and asked.served_as in (None, message.stream):
                    asked.served_as = message.stream
                    self._by_stream[message.stream] = asked
                    self._deliver(asked, message)
            case Block() | Draft() | StreamFinished() | StreamFailed():
                asked = self._by_stream.get(message.stream)
                if asked is not None:
                    self._deliver(asked, message)
            case RequestRejected():
                self._rejected(message)
            case ServerClosing():
                self.closing = message
            case ServerHello():
                self.hello = message
            case _:
                assert_never(message)

    def _deliver(
        self, asked: _Asked, event: StreamStarted | Block | Draft | StreamFinished | StreamFailed
    ) -> None:
        stream = asked.stream
        if not stream.receive(event):
            if asked.resumed_after != stream.last_seq:
                logger.warning(
                    "stream %s: an event after %s is missing", stream.stream_id, stream.last_seq
                )
                asked.resumed_after = stream.last_seq
                self._post(self._resume_of(asked))
        elif isinstance(event, StreamFinished | StreamFailed):
            self._settle(asked)

    def _rejected(self, message: RequestRejected) -> None:
        error = error_from(message.code, message.message)
        if isinstance(error, LimitExceeded):
            error.retry_after_s = message.retry_after_s
        if message.stream is None and message.request_id is None:
            # The server could not read an operation, so nobody can tell which.
            logger.error("the server cannot read a message: %s", error)
            self.fail_unanswered(error)
            return
        asked = self._by_stream.get(message.stream or "") or self._asked.get(
            message.request_id or ""
        )
        if asked is None:
            return  # a stream that was cancelled after it had ended
        if asked.cancelled and isinstance(error, StreamLost):
            asked.stream.end_cancelled()
        else:
            asked.stream.fail(error)
        self._settle(asked)

    # Small steps.

    def _unanswered(self) -> list[_Asked]:
        return [a for a in self._asked.values() if a.reached and not a.stream.started]

    def _post(self, operation: Operation) -> None:
        self._outbox.append(operation)
        self._changed()

    def _withdraw(self, request: Generate) -> None:
        self._outbox = deque(waiting for waiting in self._outbox if waiting is not request)

    def _end_here(self, asked: _Asked) -> None:
        asked.stream.end_cancelled()
        self._settle(asked)

    def _settle(self, asked: _Asked) -> None:
        self._asked.pop(asked.stream.request.request_id, None)
        if asked.served_as is not None:
            self._by_stream.pop(asked.served_as, None)
        if self._outbox:
            self._withdraw(asked.stream.request)
        self._changed()

    def _owe(self, asked: _Asked) -> None:
        self._owed[asked.stream.request.request_id] = self._cancel_of(asked)

    def _cancel_of(self, asked: _Asked) -> Cancel:
        if asked.served_as is not None:
            return Cancel(stream=asked.served_as)
        return Cancel(request_id=asked.stream.request.request_id)

    def _resume_of(self, asked: _Asked) -> Resume:
        stream = asked.stream
        assert stream.stream_id is not None
        return Resume(
            stream=stream.stream_id,
            after_seq=stream.last_seq,
            drafts=stream.request.params.drafts is True,
        )
