"""How a server listens, whom it lets in, and how it ends. Pure values, checked on construction."""

import ipaddress
from dataclasses import dataclass, field
from typing import Final, Literal

from d2f_stream.core.errors import InvalidParams, InvalidRequest
from d2f_stream.server.auth import Auth
from d2f_stream.server.limits import ServeLimits

__all__ = ["ServeSettings", "Timeouts"]

MIN_TOKEN_CHARACTERS: Final = 16


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long things may take, in seconds.

    Attributes:
        request_s: to send a whole request, from the connection's or its own beginning on.
        keep_alive_s: between two requests of a connection; longer than a proxy in front keeps its
            own, which is 60 s as a rule, or some of its requests meet a connection just closed.
        stall_s: to take any of a response that waits; longer than the limit that tells why.
        close_s: to take what is left, and to confirm, once the server closes it.
        ping_s: between websocket pings, and to answer one.
        stuck_s: for the engine to take one step; /healthz says "stuck" after it.
    """

    request_s: float = 20.0
    keep_alive_s: float = 75.0
    stall_s: float = 35.0
    close_s: float = 5.0
    ping_s: float = 20.0
    stuck_s: float = 30.0


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """How a server listens and ends.

    Attributes:
        host: address or name to listen on.
        port: 0 takes a free one.
        auth: who may connect.
        limits: what is taken on.
        timeouts: of connections.
        ui: whether to serve the chat page.
        mqtt: URL of a broker to serve too.
        log: URL of a Valkey or Redis server that keeps the streams, for all servers that name it;
            None keeps them in this process.
        mqtt_group: name under which workers share the broker's requests; hard to guess where the
            broker's users are not trusted.
        open_metrics: whether /metrics needs no token where clients need one.
        access_log: whether each request and each connection is a line of the log.
        allowed_hosts: further names under which a server that is open to this machine alone may be
            reached, such as host.docker.internal.
        insecure: whether a server without tokens may listen beyond this machine.
        on_engine_failure: "reload" loads the model anew, once, and lets the requests wait; whatever
            comes after that, or "exit", ends the server.
        shutdown_deadline_s: how long running streams may go on once it shuts down, seconds.

    Raises:
        InvalidRequest: on construction, where the settings do not fit together.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    auth: Auth = field(default_factory=Auth)
    limits: ServeLimits = field(default_factory=ServeLimits)
    timeouts: Timeouts = field(default_factory=Timeouts)
    ui: bool = True
    mqtt: str | None = None
    log: str | None = None
    mqtt_group: str = "d2f"
    open_metrics: bool = False
    access_log: bool = False
    allowed_hosts: tuple[str, ...] = ()
    insecure: bool = False
    on_engine_failure: Literal["reload", "exit"] = "reload"
    shutdown_deadline_s: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InvalidParams("port", self.port, "between 0 (any free one) and 65535")
        for client, token in self.auth.tokens.items():
            if len(token) < MIN_TOKEN_CHARACTERS:
                raise InvalidRequest(
                    f"the token of {client!r} has {len(token)} characters but needs at least "
                    f"{MIN_TOKEN_CHARACTERS}; take a random one: openssl rand -hex 24"
                )
        if not (self.is_loopback or self.auth.required or self.insecure):
            raise InvalidRequest(
                f"host {self.host} can be reached from other machines, so clients need a token: "
                "give one with --token, or let everybody in with --insecure"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False
