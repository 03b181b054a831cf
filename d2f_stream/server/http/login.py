"""Whose HTTP request it is: the bearer token in its header."""

from starlette.requests import Request

from d2f_stream.core.errors import Unauthorized
from d2f_stream.server.auth import Auth, token_of_header
from d2f_stream.server.logins import FailedLogins

__all__ = ["LastFailedLogin", "client_of"]


class LastFailedLogin(Unauthorized):
    """A wrong token, and one too many on its connection, which is to be closed."""


async def client_of(request: Request, auth: Auth, logins: FailedLogins) -> str:
    """Return the name of the client. Safe to cancel.

    Raises:
        Unauthorized: there is no token, or a wrong one, which is told after a while.
    """
    token = token_of_header(request.headers.get("authorization"))
    try:
        return auth.client_of(token)
    except Unauthorized as error:
        peer = None if request.client is None else (request.client.host, request.client.port)
        if token and await logins.refuse(peer):
            raise LastFailedLogin(str(error)) from None
        raise
