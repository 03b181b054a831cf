"""The values of a broker connection: address, messages, and what its user is told. Pure.

`channels/mqtt.py` makes the connection; the worker's and the client's side know these values only.
"""

from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import unquote, urlsplit

from d2f_stream.core.errors import InvalidRequest

__all__ = ["BrokerAddress", "Incoming", "LinkDown", "LinkUser", "Outgoing", "Refused"]


class LinkDown(Exception):
    """There is no connection to the broker now, or it broke before the broker answered."""


class Refused(Exception):
    """The broker does not allow what was asked of it; the text is its reason."""


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where a broker is and who we are there. `str` and `repr` show no credentials."""

    host: str
    port: int
    tls: bool
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str, *, password: str | None = None) -> "BrokerAddress":
        """Read mqtt://user:password@host:port or mqtts://...; the ports are 1883 and 8883.

        Args:
            url: the password in it may be left out,
            password: and given here.

        Raises:
            InvalidRequest: it is none; the sentence does not repeat it, as it may hold a password.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            parts, host, port = urlsplit(""), None, None
        if parts.scheme not in ("mqtt", "mqtts") or not host or parts.path.strip("/"):
            raise InvalidRequest(
                "the MQTT address cannot be read; it must look like mqtt://host:1883 or "
                "mqtts://user:password@host:8883, with special characters percent-encoded"
            )
        tls = parts.scheme == "mqtts"
        username = unquote(parts.username) if parts.username else None
        if password is None and parts.password is not None:
            password = unquote(parts.password)
        if password is not None and username is None:
            raise InvalidRequest(
                "a password or token for a broker needs a user: mqtt://user@host:1883"
            )
        return cls(host, port or (8883 if tls else 1883), tls, username, password)

    @property
    def credentials(self) -> str:
        """Say which of user and password were given, without telling them."""
        if self.username is None:
            return "no user was given; write mqtt://user@host, with the password as token="
        if self.password is None:
            return "a user was given and no password; pass that as token="
        return "a user and a password were given"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Incoming:
    """A message of the broker's; `notes` are its user properties."""

    topic: str
    payload: bytes
    content_type: str | None
    notes: dict[str, str]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message for the broker. `expiry_s`: how long the broker keeps it, whole seconds."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False
    content_type: str | None = None
    expiry_s: int | None = None
    notes: tuple[tuple[str, str], ...] = ()


class LinkUser(Protocol):
    """Whose link it is. Called on the event loop; must not raise, and not wait for the broker."""

    def on_connected(self) -> None:
        """The connection stands and the subscriptions are made, again or for the first time."""
        ...

    async def on_message(self, message: Incoming) -> None:
        """A message came."""
        ...

    def on_lost(self, reason: str, *, refused: bool) -> None:
        """The connection broke or could not be made; it will be tried again."""
        ...

    def on_refused(self, message: Outgoing, reason: str) -> None:
        """The broker does not take a message that was posted."""
        ...
