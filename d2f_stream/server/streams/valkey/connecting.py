"""Connecting to a Valkey or Redis server: its URL, what may answer there, and how it is told of.

This file, `store.py` and `news.py` are all that knows the library.
"""

import contextlib
import logging
import re
import urllib.parse
from pathlib import Path
from types import MappingProxyType
from typing import Final

from d2f_stream.channels.patience import patient_timeout
from d2f_stream.channels.unreachable import reason_of
from d2f_stream.core.errors import InvalidRequest, LogUnavailable, MissingExtra

try:
    from valkey import exceptions
    from valkey.asyncio.connection import AbstractConnection, ConnectionPool
except ImportError as error:
    raise MissingExtra("a log that servers share", "valkey", "log") from error

__all__ = [
    "ANSWER_S",
    "BACKOFF_S",
    "LOST",
    "AbstractConnection",
    "ConnectionPool",
    "address_of",
    "check_server",
    "exceptions",
    "open_connection",
    "passing_of",
    "pool_of",
    "sentence_of",
]

logger = logging.getLogger("d2f_stream.server")

ANSWER_S: Final = 5.0
"""For the store to answer; later, the connection counts as broken."""
BACKOFF_S: Final = (0.05, 0.1, 0.2, 0.5, 1.0)
"""Between attempts to connect; the last is for all later ones."""
OLDEST: Final = 7
"""Major version of Redis; Valkey tells the one that it is compatible with."""
FILES: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
"""Options of a URL that name a file."""
LOST: Final = (exceptions.ConnectionError, exceptions.TimeoutError, OSError)
"""What the library raises where a connection cannot be made, or breaks."""
PASSING: Final = MappingProxyType(
    {
        "READONLY": "it is a read-only replica; name the server that takes writes, or wait until "
        "this one takes its place",
        "NOREPLICAS": "fewer replicas are connected than its min-replicas-to-write wants",
        "MISCONF": "it cannot write to its disk; make room there, or look at its own log",
        "MASTERDOWN": "it is a replica that has lost its primary",
        "LOADING": "it is reading its data from the disk",
        "BUSY": "a script keeps it busy",
        "UNKILLABLE": "a script keeps it busy",
    }
)
"""What a store answers that is being mended, or takes another's place, and what that means.

CLUSTERDOWN and TRYAGAIN are of clusters, which are refused.
"""


async def open_connection(pool: ConnectionPool) -> AbstractConnection:
    """Return a new connection, logged in; whoever uses it limits how long many answers may take.

    Raises:
        TimeoutError: that took too long. It is one of `LOST`, as are most of the library's errors.
    """
    connection: AbstractConnection = pool.make_connection()
    try:
        async with patient_timeout(ANSWER_S):
            await connection.connect()
    except BaseException:
        with contextlib.suppress(*LOST):
            await connection.disconnect(nowait=True)
        raise
    return connection


async def check_server(connection: AbstractConnection, address: str) -> None:
    """Refuse a server that cannot keep a log.

    Raises:
        LogUnavailable: it is too old, or spreads its keys.
    """
    await connection.send_command("INFO", check_health=False)
    answer = await connection.read_response()
    lines = answer.decode().splitlines() if isinstance(answer, bytes) else []
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    version = facts.get("redis_version", "0")
    if int(version.partition(".")[0]) < OLDEST:
        raise LogUnavailable(
            f"the log at {address} is Redis {version} but must be {OLDEST} or newer, or Valkey"
        )
    if facts.get("redis_mode") == "cluster":
        raise LogUnavailable(
            f"the log at {address} is a cluster, over which streams cannot be spread; name a "
            "server of its own, with replicas if wanted"
        )
    policy = facts.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        logger.warning(
            "the log at %s drops streams when its memory is full, even running ones: its "
            "maxmemory-policy is %s; set noeviction",
            address,
            policy,
        )


def address_of(url: str) -> str:
    """Return what may be shown of a store's URL: host and port, but no user and no password."""
    parts = urllib.parse.urlsplit(url)
    place = parts.netloc.rpartition("@")[2] or "localhost"
    if re.search(r":\d*$", place) is None:
        place += ":6379"
    return f"{place}{parts.path.rstrip('/')}"


def pool_of(url: str) -> ConnectionPool:
    """Return what makes connections to a URL.

    Raises:
        InvalidRequest: the URL cannot be used.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("valkey", "valkeys", "redis", "rediss"):
            raise ValueError("no such scheme")
        if re.fullmatch(r"(/\d*)?", parts.path) is None:
            raise ValueError("no number of a database")
        _ = parts.port
        certificates = _named_files(parts.query)
        # With a timeout the library sends by asyncio.wait_for, which before Python 3.12 swallows a
        # cancellation that comes together with its result: the caller's timeout, or its end.
        pool = ConnectionPool.from_url(
            url, socket_timeout=None, socket_connect_timeout=ANSWER_S, lib_name=None
        )
        pool.make_connection()  # tells of options that there are none of
    except (ValueError, TypeError, exceptions.ValkeyError) as error:
        # Not shown: it may hold a password.
        raise InvalidRequest(
            "the log needs a URL such as valkey://127.0.0.1:6379/0 or, with a password and TLS, "
            "valkeys://user:password@host:6379/0"
        ) from error
    for option, path in certificates:
        if not Path(path).is_file():
            raise InvalidRequest(f"{option} of the log's URL is {path!r:.200}, which is no file")
    return pool


def _named_files(query: str) -> list[tuple[str, str]]:
    return [(name, path) for name, path in urllib.parse.parse_qsl(query) if name in FILES]


def sentence_of(error: Exception) -> str:
    """Return what an error of the library means, for people."""
    if isinstance(error, exceptions.TimeoutError | TimeoutError):
        return f"it did not answer within {ANSWER_S:g} s"
    if isinstance(error, exceptions.AuthenticationError):
        return "it does not take the user and password of the URL, or wants some"
    if isinstance(error, exceptions.InvalidResponse):
        return "what answers there is no Valkey or Redis"
    if (passing := passing_of(error)) is not None:
        return passing
    sentence, _, _ = reason_of(error).partition(" script: ")  # of ours, and its hash
    return sentence.rstrip(".")


def passing_of(error: Exception) -> str | None:
    """Return what an answer means that another try may not get; None where it is another one."""
    if isinstance(error, exceptions.ReadOnlyError):  # the library keeps its code for itself
        return PASSING["READONLY"]
    if isinstance(error, exceptions.BusyLoadingError):
        return PASSING["LOADING"]
    return next((told for code, told in PASSING.items() if str(error).startswith(code)), None)
