"""Asked: one request of a conversation that no server has ended, and what can be said about it."""

from dataclasses import dataclass
from typing import NamedTuple

from d2f_stream.client.remote import RemoteStream
from d2f_stream.core.errors import D2FError
from d2f_stream.wire.protocol import Cancel, Operation, Resume

__all__ = ["Asked", "Post"]


class Post(NamedTuple):
    """What is to be sent: an operation, for which request, and to which server ("": to any)."""

    operation: Operation
    request_id: str
    server: str = ""


@dataclass(slots=True, eq=False)
class Asked:
    """A request that no server has ended.

    Attributes:
        stream: joins its events.
        reached: whether a server may know of it.
        cancelled: whether nobody reads it any more.
        resumed_after: what was asked for again on this connection, because an event was missing.
        served_as: the server's name of the stream; known even where its reader has gone before.
        server: that runs it.
        num_bounces: how often a closing server turned it away.
        lost: what it ends with where the server that it was moved to does not know it.
    """

    stream: RemoteStream
    reached: bool = False
    cancelled: bool = False
    resumed_after: int | None = None
    served_as: str | None = None
    server: str = ""
    num_bounces: int = 0
    lost: D2FError | None = None

    @property
    def request_id(self) -> str:
        """The client's name for it."""
        return self.stream.request.request_id

    def ask(self) -> Post:
        """Return what asks for it, from any server."""
        return Post(self.stream.request, self.request_id)

    def resume(self) -> Post:
        """Return what asks its server to be read on from the last event that came."""
        assert self.served_as is not None, "only what has started can be read on"
        drafts = self.stream.request.params.drafts is True
        after_seq = self.stream.last_seq
        resume = Resume(stream=self.served_as, after_seq=after_seq, drafts=drafts)
        return Post(resume, self.request_id, self.server)

    def cancel(self) -> Post:
        """Return what ends it: by the stream's name once that is known."""
        if self.served_as is not None:
            return Post(Cancel(stream=self.served_as), self.request_id, self.server)
        return Post(Cancel(request_id=self.request_id), self.request_id)
