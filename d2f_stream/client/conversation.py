"""Conversation: what a client has asked, and what it has to say next. Pure.

Knows requests, messages and whether anybody listens; nothing of channels, topics, tasks or time.
Operations are pulled (`next_post`), messages are pushed (`receive`). Over a websocket one server
answers; behind a broker there are several, of which the first that starts a request runs it.

It survives its connections: on a new one (`opened`) it asks to read on what had started, and asks
again for what had not, under the same request id, so that nothing is started twice. So whatever is
said may be said twice, and whatever comes may come twice. The rules stand in a table of cases that
the browser's client follows too: tests/sdk/conversation_cases.json.
"""

import logging
from collections.abc import Callable
from typing import Final, assert_never

from d2f_stream.client.asked import Asked, Post
from d2f_stream.client.outbox import Outbox
from d2f_stream.client.remote import RemoteStream
from d2f_stream.client.requests import Requests
from d2f_stream.core.buffer import EventBuffer
from d2f_stream.core.errors import D2FError, MessageTooLarge, StreamLost
from d2f_stream.core.events import (
    Block,
    Draft,
    Event,
    StreamFailed,
    StreamFinished,
    StreamNames,
    StreamStarted,
)
from d2f_stream.wire.close_codes import MESSAGE_TOO_LARGE, final_error
from d2f_stream.wire.protocol import (
    Cancel,
    Generate,
    RequestRejected,
    ServerClosing,
    ServerHello,
    ServerMessage,
)

__all__ = ["Conversation"]

logger = logging.getLogger("d2f_stream.client")

MAX_BOUNCES: Final = 3
"""So often a request that a closing server turns away is put to another."""


class Conversation:
    """The requests of one client, over all its connections.

    Attributes:
        up: whether somebody listens: the server has said hello on a connection that is not known
            to be broken, or a worker is online.
        hello: what the server said last; None before the first time.
        closing: what it said, if it shuts down.

    Args:
        changed: called when there is something to send, or when a request has ended.
        ended: called with the id of each request that is over.
        has_others: whether another server may take what a closing one turns away.
    """

    def __init__(
        self,
        changed: Callable[[], None],
        *,
        ended: Callable[[str], None] = lambda _: None,
        has_others: bool = False,
    ) -> None:
        self.up = False
        self.hello: ServerHello | None = None
        self.closing: ServerClosing | None = None
        self._changed = changed
        self._ended = ended
        self._max_bounces = MAX_BOUNCES if has_others else 0
        self._requests = Requests()
        self._outbox = Outbox()

    @property
    def busy(self) -> bool:
        """Whether a connection is needed."""
        return bool(self._requests) or self._outbox.is_owing

    @property
    def num_requests(self) -> int:
        """Requests that are not over."""
        return len(self._requests)

    # The reader's side: requests come and are given up.

    def ask(self, request: Generate, buffer: EventBuffer, names: StreamNames | None = None) -> None:
        """Take a request on; `buffer` gets its events."""
        asked = Asked(RemoteStream(request, buffer, names))
        self._requests.add(asked)
        if self.up:
            self._post(asked.ask())
        else:
            self._changed()

    def cancel(self, request_id: str) -> None:
        """Give a request up: the server ends it, or we do here and tell it later. Idempotent."""
        asked = self._requests.get(request_id)
        if asked is None or asked.cancelled:
            return
        asked.cancelled = True
        if not asked.reached:
            self._end_here(asked)
        elif self.up:
            self._post(asked.cancel())
        else:
            self._outbox.owe(asked)
            self._end_here(asked)

    def end_cancelled(self, request_id: str) -> None:
        """Wait no longer for the server's last word on a request that was given up. Idempotent."""
        asked = self._requests.get(request_id)
        if asked is not None:
            self._end_here(asked)

    def has_started(self, request_id: str) -> bool:
        """Whether a server runs the request."""
        asked = self._requests.get(request_id)
        return asked is not None and asked.served_as is not None

    def abandon(self, error: D2FError) -> None:
        """Let every reader see `error` at once, and have the servers end what they run."""
        for asked in self._requests:
            asked.stream.fail(error)
            self.cancel(asked.request_id)

    def fail(self, error: D2FError, *, started: bool = True) -> None:
        """End everything on this side, or what has not started; nothing more is sent for it."""
        if started:
            self._outbox.clear()
            self._outbox.forgive()
        for asked in self._requests:
            if started or asked.served_as is None:
                self._fail(asked, error)

    def fail_request(self, request_id: str, error: D2FError) -> None:
        """End one request on this side."""
        if (asked := self._requests.get(request_id)) is not None:
            self._fail(asked, error)

    # The connection's side.

    def opened(self, hello: ServerHello | None = None) -> None:
        """Note that somebody listens: cancel what is owed, read on, and ask again."""
        self.up = True
        self.hello = hello or self.hello
        self._outbox.pay()
        self.recover()

    def recover(self, server: str | None = None, *, unstarted: bool = True) -> None:
        """Say again what may be lost: for the streams of one server or all, and for requests."""
        if not self.up:
            return
        for asked in self._requests:
            if asked.served_as is None:
                if unstarted:
                    self._outbox.append(asked.ask())
            elif server in (None, asked.server):
                if asked.cancelled:
                    self._outbox.append(asked.cancel())
                asked.resumed_after = None
                self._outbox.append(asked.resume())
        self._changed()

    def broken(self) -> None:
        """Note that nobody listens any more. What was cancelled meanwhile ends here."""
        self.up, self.closing = False, None
        self._outbox.clear()
        for asked in self._requests:
            asked.resumed_after = None
            if asked.cancelled:
                self._outbox.owe(asked)
                self._end_here(asked)

    def closed(self, code: int, reason: str) -> D2FError | None:
        """Note that the server closed the connection; return why trying again is of no use.

        In that case everything has ended on this side.
        """
        self.broken()
        if code == MESSAGE_TOO_LARGE and (largest := self._requests.largest_unanswered):
            # Sent again, it would be refused again. Which it was is not told: if not the largest
            # alone, then the next is found in the same way.
            text = f"a message was too large for the other side: {code} {reason}".strip()
            self._fail(largest, MessageTooLarge(text))
        error = final_error(code, reason)
        if error is not None:
            self.fail(error)
        return error

    def lost(self, server: str, error: D2FError, *, heir: str = "") -> None:
        """End the streams of a server that is gone, or read them on at its heir."""
        for asked in self._requests:
            if asked.served_as is not None and asked.server == server:
                asked.server, asked.lost = heir, error
                if not heir:
                    self._fail(asked, error)
        self.recover(heir or server, unstarted=False)

    def next_post(self) -> Post | None:
        """Take what is to be sent next; None where there is nothing now."""
        post = self._outbox.take()
        if post is not None and isinstance(post.operation, Generate):
            self._requests[post.request_id].reached = True
        return post

    def receive(
        self, message: ServerMessage, *, server: str = "", request_id: str | None = None
    ) -> None:
        """Take what a server sent.

        Args:
            message: of the server.
            server: which; "" where there is but one.
            request_id: that it is about, where the transport says so.
        """
        match message:
            case StreamStarted():
                self._started(message, server)
            case Block() | Draft() | StreamFinished() | StreamFailed():
                asked = self._requests.of_stream(message.stream)
                if asked is None and request_id is not None:
                    asked = self._requests.join(request_id, message.stream, server)
                if asked is not None:
                    self._deliver(asked, message)
            case RequestRejected():
                self._rejected(message, message.request_id or request_id)
            case ServerClosing():
                self.closing = message
            case ServerHello():
                self.hello = message
            case _:
                assert_never(message)

    def _started(self, event: StreamStarted, server: str) -> None:
        asked = self._requests.get(event.request_id)
        if self._requests.is_superfluous(event.request_id, event.stream):
            self._post(Post(Cancel(stream=event.stream), event.request_id, server))
        elif asked is not None:
            self._requests.serve(asked, event.stream, server)
            self._deliver(asked, event)

    def _deliver(self, asked: Asked, event: Event) -> None:
        stream = asked.stream
        if not stream.receive(event):
            if asked.resumed_after != stream.last_seq:
                logger.warning(
                    "stream %s: an event after %s is missing", asked.served_as, stream.last_seq
                )
                asked.resumed_after = stream.last_seq
                self._post(asked.resume())
        elif isinstance(event, StreamFinished | StreamFailed):
            self._settle(asked)

    def _rejected(self, message: RequestRejected, request_id: str | None) -> None:
        error = message.error()
        if message.stream is None and request_id is None:
            # The server could not read an operation, so nobody can tell which.
            logger.error("the server cannot read a message: %s", error)
            for unanswered in self._requests.unanswered:
                self._fail(unanswered, error)
            return
        asked = self._requests.of_stream(message.stream or "")
        asked = asked or self._requests.get(request_id or "")
        if asked is None:
            return  # a stream that was cancelled after it had ended
        if asked.served_as is not None and asked.served_as != message.stream:
            return  # a second server refuses what the first has begun
        if message.code == "shutting_down" and asked.num_bounces < self._max_bounces:
            asked.num_bounces += 1
            self._post(asked.ask())
        elif asked.cancelled and isinstance(error, StreamLost):
            self._end_here(asked)
        else:
            self._fail(asked, (asked.lost if isinstance(error, StreamLost) else None) or error)

    def _post(self, post: Post) -> None:
        self._outbox.append(post)
        self._changed()

    def _end_here(self, asked: Asked) -> None:
        asked.stream.end_cancelled()
        self._settle(asked)

    def _fail(self, asked: Asked, error: D2FError) -> None:
        asked.stream.fail(error)
        self._settle(asked)

    def _settle(self, asked: Asked) -> None:
        self._requests.remove(asked)
        self._outbox.forget(asked.request_id)
        self._ended(asked.request_id)
        self._changed()
