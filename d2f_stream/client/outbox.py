"""Outbox: what a client has to say to its servers, in order, and the cancels that it owes them."""

from collections import deque

from d2f_stream.client.asked import Asked, Post
from d2f_stream.wire.protocol import Cancel

__all__ = ["Outbox"]


class Outbox:
    """Posts that wait for a connection to take them.

    What a lost connection has taken may not have arrived: a cancel is owed until the next
    connection takes it.
    """

    def __init__(self) -> None:
        self._posts: deque[Post] = deque()
        self._owed: dict[str, Post] = {}  # by request id: cancels of what ended on this side

    @property
    def is_owing(self) -> bool:
        """Whether a server is still to hear of a cancel."""
        return bool(self._owed)

    def append(self, post: Post) -> None:
        """Say something."""
        self._posts.append(post)

    def owe(self, asked: Asked) -> None:
        """Keep a request's cancel for the next connection."""
        self._owed[asked.request_id] = asked.cancel()

    def pay(self) -> None:
        """Say what is owed."""
        self._posts.extend(self._owed.values())

    def take(self) -> Post | None:
        """Take what is to be sent next; None where there is nothing now."""
        if not self._posts:
            return None
        post = self._posts.popleft()
        if isinstance(post.operation, Cancel):
            self._owed = {name: owed for name, owed in self._owed.items() if owed is not post}
        return post

    def forget(self, request_id: str) -> None:
        """Say no more of a request, except that it is cancelled."""
        if self._posts:
            self._posts = deque(
                post
                for post in self._posts
                if post.request_id != request_id or isinstance(post.operation, Cancel)
            )

    def clear(self) -> None:
        """Say nothing of all this; what is owed stays so."""
        self._posts.clear()

    def forgive(self) -> None:
        """Owe nothing any more."""
        self._owed.clear()
