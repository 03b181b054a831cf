"""Requests: those of a client, by their ids and by the streams that serve them; some ended ones."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

from d2f_stream.client.asked import Asked
from d2f_stream.wire.codec import JSON

__all__ = ["Requests"]

MAX_REMEMBERED: Final = 1024
"""Requests that are over, remembered so that their late start can be cancelled."""


class Requests:
    """The requests that no server has ended, in order; iterating allows for changes."""

    def __init__(self) -> None:
        self._asked: dict[str, Asked] = {}
        self._by_stream: dict[str, Asked] = {}
        self._over: OrderedDict[str, str | None] = OrderedDict()  # request id -> stream

    def __len__(self) -> int:
        return len(self._asked)

    def __iter__(self) -> Iterator[Asked]:
        return iter(list(self._asked.values()))

    def __getitem__(self, request_id: str) -> Asked:
        return self._asked[request_id]

    def add(self, asked: Asked) -> None:
        """Take one on."""
        self._asked[asked.request_id] = asked

    def get(self, request_id: str) -> Asked | None:
        """Return a request; None where it is over or not known."""
        return self._asked.get(request_id)

    def of_stream(self, stream: str) -> Asked | None:
        """Return the request that a stream serves; None where it is over or not known."""
        return self._by_stream.get(stream)

    def serve(self, asked: Asked, stream: str, server: str) -> None:
        """Note which stream of which server serves a request."""
        asked.served_as, asked.server = stream, server
        self._by_stream[stream] = asked

    def join(self, request_id: str, stream: str, server: str) -> Asked | None:
        """Serve a request by a stream whose start was missed; None where it is none of these."""
        asked = self._asked.get(request_id)
        if asked is None or asked.served_as is not None:
            return None
        self.serve(asked, stream, server)
        return asked

    def remove(self, asked: Asked) -> None:
        """Note that a request is over."""
        self._asked.pop(asked.request_id, None)
        if asked.served_as is not None:
            self._by_stream.pop(asked.served_as, None)
        self._over[asked.request_id] = asked.served_as
        if len(self._over) > MAX_REMEMBERED:
            self._over.popitem(last=False)

    def is_superfluous(self, request_id: str, stream: str) -> bool:
        """Whether a stream that starts runs what another one runs already, or what is over."""
        if (asked := self._asked.get(request_id)) is not None:
            return asked.served_as not in (None, stream)
        return request_id in self._over and self._over[request_id] != stream

    @property
    def unanswered(self) -> list[Asked]:
        """Those that a server may know of, and has not started."""
        return [asked for asked in self if asked.reached and asked.served_as is None]

    @property
    def largest_unanswered(self) -> Asked | None:
        """The one of them that is the most to send."""
        return max(self.unanswered, key=_size, default=None)


def _size(asked: Asked) -> int:
    return len(JSON.encode(asked.stream.request))
