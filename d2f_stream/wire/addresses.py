"""Addresses: what must not stand in one, since proxies, logs and histories keep them."""

from typing import Final

__all__ = ["SECRETS"]

SECRETS: Final = frozenset(
    {"token", "access_token", "auth_token", "auth", "api_key", "apikey", "key", "password"}
)
"""Names of query parameters that hold one, in lower case."""
