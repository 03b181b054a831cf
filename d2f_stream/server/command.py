"""The command `d2f-stream serve`: its arguments, and what they make of settings.

Imports nothing of the [serve] extra before it runs, so that the other commands need none.
"""

import argparse
import asyncio
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from d2f_stream.channels.broker import BrokerAddress
from d2f_stream.core.errors import InvalidParams, InvalidRequest, MissingExtra
from d2f_stream.core.limits import Limits
from d2f_stream.core.session import Engine
from d2f_stream.server.auth import Auth
from d2f_stream.server.loading import add_loading, check_unset
from d2f_stream.server.options import add_options, limits_of, timeouts_of
from d2f_stream.server.settings import ServeSettings

__all__ = ["add_arguments", "run", "settings_of", "tokens_of"]

NAMED_TOKEN: Final = re.compile(r"([A-Za-z0-9._-]{1,64})=(.*[^=].*)")
SWITCH_S: Final = 0.0005
"""Seconds after which the event loop's thread lets the device's run, which waits for the next step.
Python's own are ten times as long: with many answers at once longer than a small model's step."""
NOTE: Final = """\
Clients need a token where one is given, by --token, --token-file or the environment variable
D2F_TOKEN. A token on the command line is visible to everybody on this machine in the list of
processes; the other two are not, nor is a password in D2F_MQTT or D2F_LOG instead of --mqtt and
--log.
NAME tells clients apart: streams belong to their client, and one client can neither read nor
cancel another's.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_loading(parser)
    parser.add_argument(
        "--engines",
        metavar="URL",
        help="serve the engines of a Ray cluster instead: ray:// is the one that this machine "
        "belongs to, ray://HOST:PORT another",
    )

    reach = parser.add_argument_group("who can connect")
    reach.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    reach.add_argument("--port", type=int, default=8000, help="0 is a free one (%(default)s)")
    reach.add_argument(
        "--token", action="append", default=[], metavar="[NAME=]TOKEN", help="may be repeated"
    )
    reach.add_argument(
        "--token-file", type=Path, metavar="FILE", help="tokens, one [NAME=]TOKEN a line"
    )
    reach.add_argument(
        "--origin",
        action="append",
        default=[],
        metavar="URL",
        help="let pages of this origin connect too, https://chat.example.com; may be repeated",
    )
    reach.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="answer under this name too where no token is needed: host.docker.internal, the name "
        "of this machine for a container; may be repeated",
    )
    reach.add_argument(
        "--insecure", action="store_true", help="listen beyond this machine without a token"
    )
    reach.add_argument("--mqtt", metavar="URL", help="serve a broker too, mqtt[s]://host[:port]")
    reach.add_argument(
        "--log",
        metavar="URL",
        help="keep answers in a Valkey or Redis server, valkey://host:6379, so that other servers "
        "that name it can read them on",
    )
    reach.add_argument(
        "--mqtt-group",
        default="d2f",
        metavar="NAME",
        help="workers of one group share the requests (d2f)",
    )
    reach.add_argument(
        "--ui", action=argparse.BooleanOptionalAction, default=True, help="the chat page at /"
    )

    add_options(parser)

    telling = parser.add_argument_group("what it tells")
    telling.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="on standard error (%(default)s)",
    )
    telling.add_argument(
        "--access-log", action="store_true", help="a line for each request and connection"
    )
    telling.add_argument(
        "--open-metrics", action="store_true", help="let /metrics be read without a token"
    )
    telling.add_argument(
        "--on-engine-failure",
        choices=("reload", "exit"),
        default="reload",
        help="load the model anew, once, or end (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Load the model, serve it until a signal comes, and return the exit code.

    Raises:
        InvalidRequest: the arguments do not fit together.
        MissingExtra: a library is not installed.
        D2FError: the model cannot be loaded, or the address cannot be listened on.
    """
    try:
        from d2f_stream.server.listening.listener import check_address
        from d2f_stream.server.serve import configure_logging, serve
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("d2f_stream", "d2f_runtime")):
            raise
        library = (error.name or "starlette").partition(".")[0]
        raise MissingExtra("serving", library, "serve") from error
    settings = settings_of(args, os.environ)
    if settings.mqtt is not None and importlib.util.find_spec("aiomqtt") is None:
        raise MissingExtra("serving over MQTT", "aiomqtt", "mqtt")
    if args.engines is not None:
        check_unset(args)
    if settings.log is not None:
        from d2f_stream.server.streams.valkey.connecting import pool_of

        pool_of(settings.log)
    check_address(settings.host, settings.port)
    configure_logging(args.log_level)
    if args.engines is None:
        from d2f_runtime.engine.opening import fetch_model

        fetch_model(
            args.model,
            adapter=args.adapter,
            backend=args.backend,
            device=args.device,
            family=args.family,
        )

    sys.setswitchinterval(SWITCH_S)

    async def run_engine() -> int:
        async with await _engine_of(args, settings) as engine:
            return await serve(engine, settings)

    return asyncio.run(run_engine())


async def _engine_of(args: argparse.Namespace, settings: ServeSettings) -> Engine:
    """Return the engine to serve: one of this process, or the engines of a cluster."""
    if args.engines is not None:
        from d2f_stream.cluster.engines_url import EnginesUrl

        url = EnginesUrl.parse(args.engines)
        from d2f_stream.cluster.ray_calls import connect_engines

        return await connect_engines(url, logs=settings.log is not None)
    from d2f_runtime.engine.opening import open_engine

    return open_engine(
        args.model,
        adapter=args.adapter,
        backend=args.backend,
        device=args.device,
        quantization=args.quantization,
        kv_tokens=args.kv_tokens,
        family=args.family,
        warm_up=args.warm_up,
        limits=Limits(
            max_prompt_tokens=settings.limits.max_prompt_tokens, may_narrow=args.may_narrow
        ),
    )


def settings_of(args: argparse.Namespace, environment: Mapping[str, str]) -> ServeSettings:
    """Return the settings that the arguments, and D2F_TOKEN, D2F_MQTT and D2F_LOG ask for.

    Raises:
        InvalidRequest: they do not fit together.
    """
    limits, timeouts = limits_of(args), timeouts_of(args)
    mqtt = _url("--mqtt", args.mqtt) or environment.get("D2F_MQTT") or None
    if mqtt is not None:
        try:
            BrokerAddress.parse(mqtt)
        except InvalidRequest as error:
            raise InvalidRequest(f"--mqtt: {error}") from None
    given = [*args.token, *_lines_of(args.token_file)]
    if environment.get("D2F_TOKEN"):
        given.append(environment["D2F_TOKEN"])
    return ServeSettings(
        host=args.host,
        port=args.port,
        auth=Auth(tokens_of(given), tuple(_origin(origin) for origin in args.origin)),
        limits=limits,
        timeouts=timeouts,
        ui=args.ui,
        mqtt=mqtt,
        log=_url("--log", args.log) or environment.get("D2F_LOG") or None,
        mqtt_group=args.mqtt_group,
        allowed_hosts=tuple(_host(name) for name in args.allowed_host),
        insecure=args.insecure,
        open_metrics=args.open_metrics,
        access_log=args.access_log,
        on_engine_failure=args.on_engine_failure,
        shutdown_deadline_s=args.shutdown_deadline_s,
    )


def tokens_of(given: Iterable[str]) -> dict[str, str]:
    """Return the token of each client; clients without a name are called client-1, client-2, ...

    Raises:
        InvalidRequest: a name or a token comes twice. Tokens are never shown.
    """
    tokens: dict[str, str] = {}
    for number, text in enumerate(given, 1):
        named = NAMED_TOKEN.fullmatch(text)
        client, token = named.groups() if named else (f"client-{number}", text)
        if client in tokens:
            raise InvalidRequest(f"the client {client!r} has two tokens; give each its own name")
        if token in tokens.values():
            raise InvalidRequest(f"the token of {client!r} is another client's too")
        tokens[client] = token
    return tokens


def _lines_of(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeError) as error:
        raise InvalidRequest(f"the token file {path} cannot be read: {error}") from error
    tokens = [line for line in lines if line and not line.startswith("#")]
    if not tokens:
        raise InvalidRequest(f"the token file {path} holds no token")
    return tokens


def _url(option: str, given: str | None) -> str | None:
    if given is not None and not given.strip():  # "$URL", of a variable that is not set
        raise InvalidRequest(f"{option} is empty; give it a URL, or leave it out")
    return given


def _host(name: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9._-]+", name) is None:
        allowed = "a name without scheme and port, such as host.docker.internal"
        raise InvalidParams("--allowed-host", name, allowed)
    return name.lower()


def _origin(text: str) -> str:
    if text != "*" and re.fullmatch(r"https?://[^/\s]+/?", text) is None:
        raise InvalidParams("--origin", text, "an origin, such as https://chat.example.com, or *")
    return text.rstrip("/")
