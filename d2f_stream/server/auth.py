"""Who may connect: bearer tokens and browser origins. Pure; knows no transport.

A token stands for a client by name; streams belong to that name. Tokens are compared in constant
time, are never logged, and are not read from query strings, which end up in logs.
"""

import base64
import binascii
import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from d2f_stream.core.errors import Unauthorized

__all__ = [
    "AUTH_SUBPROTOCOL",
    "LOCAL",
    "Auth",
    "asker_of",
    "token_of_header",
    "token_of_subprotocols",
]

LOCAL: Final = "local"
"""The client that everybody is where the server has no tokens."""

AUTH_SUBPROTOCOL: Final = "d2f.auth."
"""Prefix of the websocket subprotocol that carries a token, as unpadded base64url."""


@dataclass(frozen=True, slots=True)
class Auth:
    """The tokens and origins of one server.

    Attributes:
        tokens: the token of each client, by the client's name; empty lets everybody in.
        origins: browser origins, such as "https://chat.example.com", that may connect beside the
            server's own, and whose hosts the server may be reached as; "*" allows all.
    """

    tokens: Mapping[str, str] = field(default_factory=dict, repr=False)
    origins: tuple[str, ...] = ()

    @property
    def required(self) -> bool:
        """Whether a client needs a token."""
        return bool(self.tokens)

    def client_of(self, token: str | None) -> str:
        """Return the name of the client that the token stands for.

        Raises:
            Unauthorized: there is none.
        """
        if not self.tokens:
            return LOCAL
        given = (token or "").encode(errors="surrogatepass")
        found: str | None = None
        for client, known in self.tokens.items():  # all of them: the time must not tell which
            if hmac.compare_digest(known.encode(), given):
                found = client
        if found is None:
            raise Unauthorized("the token is wrong" if token else "no token was given")
        return found

    def allows_origin(self, origin: str | None, host: str | None) -> bool:
        """Whether a page of that origin may connect to the server that it reached as `host`.

        Programs send no origin; a page of the server's own is let in.
        """
        if origin is None or "*" in self.origins:
            return True
        if origin.rstrip("/") in self.origins:
            return True
        try:
            netloc = urlsplit(origin).netloc
        except ValueError:  # such as http://[
            return False
        return bool(host) and netloc.lower() == str(host).lower()


def asker_of(client: str, place: object) -> str:
    """Return who takes turns with others: the client, or the place where everybody is one.

    Args:
        client: its name.
        place: a connection or a host.
    """
    return f"{client} at {place}" if client == LOCAL else client


def token_of_header(authorization: str | None) -> str | None:
    """Return the token of an `Authorization: Bearer ...` header; None where there is none."""
    kind, _, token = (authorization or "").strip().partition(" ")
    return token.strip() or None if kind.lower() == "bearer" else None


def token_of_subprotocols(subprotocols: Iterable[str]) -> str | None:
    """Return the token that a browser offered among its subprotocols; None where there is none."""
    for name in subprotocols:
        if name.startswith(AUTH_SUBPROTOCOL):
            text = name.removeprefix(AUTH_SUBPROTOCOL)
            try:
                return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode() or None
            except (binascii.Error, UnicodeDecodeError, ValueError):
                return None
    return None
