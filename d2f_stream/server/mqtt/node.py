"""Node: what a worker is called, and what it says of itself."""

import math
import secrets
import socket
from typing import Final, Literal

from d2f_stream.channels.broker import Outgoing
from d2f_stream.wire.codec import JSON
from d2f_stream.wire.protocol import ServerHello
from d2f_stream.wire.topics import NodeStatus, NodeStatusTopic, check_name, encode

__all__ = ["STATUS_INTERVAL_S", "Node"]

STATUS_INTERVAL_S: Final = 30.0
"""Between two announcements; three missed ones count as gone."""


class Node:
    """One start of a worker.

    Attributes:
        name: as topics have it.
        num_connections: to the broker, so far.

    Args:
        name: for people; a random part is added. None is the host's name.
        hello: what the worker tells clients.
        log: name of the log that it shares with others, or "".

    Raises:
        InvalidRequest: topics cannot have the name.
    """

    def __init__(self, name: str | None, hello: ServerHello, *, log: str = "") -> None:
        self.name = f"{_host_name() if name is None else name}-{secrets.token_hex(4)}"
        check_name("node", self.name)
        self.num_connections = 0
        self._hello = hello
        self._log = log

    def status(self, status: Literal["online", "closing", "offline"]) -> Outgoing:
        """Return what announces the node."""
        news = NodeStatus(
            node=self.name,
            status=status,
            connection=self.num_connections,
            ttl_s=3 * STATUS_INTERVAL_S,
            hello=None if status == "offline" else self._hello,
            log=self._log,
        )
        return Outgoing(
            str(NodeStatusTopic(self.name)),
            encode(news),
            retain=True,
            content_type=JSON.content_type,
            expiry_s=math.ceil(news.ttl_s),
        )


def _host_name() -> str:
    kept = "".join(
        sign if sign.isascii() and sign.isalnum() else "-" for sign in socket.gethostname()
    )
    return kept.strip("-")[:64] or "worker"
