"""EnginesUrl: where the engines of a cluster are."""

import re
from typing import Final, NamedTuple

from d2f_stream.core.errors import InvalidRequest

__all__ = ["EnginesUrl"]

URL: Final = re.compile(r"ray://(?P<address>[^/?#@\s]*)(?:/(?P<app>[A-Za-z0-9_.-]+))?/?")


class EnginesUrl(NamedTuple):
    """Where engines are: ray://[HOST:PORT][/APP].

    Attributes:
        address: of the cluster's head, where it tells others of itself; "" is the cluster that a
            Ray of this machine belongs to.
        app: the application's name in Serve.
    """

    address: str
    app: str

    @classmethod
    def parse(cls, url: str) -> "EnginesUrl":
        """Read a URL.

        Raises:
            InvalidRequest: it is none of engines.
        """
        found = URL.fullmatch(url)
        if found is None:
            raise InvalidRequest(
                f"--engines is {url!r:.200} but must be ray://, for the cluster of this machine's "
                "Ray, or ray://HOST:PORT, and may end with /APP"
            )
        return cls(found["address"], found["app"] or "default")
