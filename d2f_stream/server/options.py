"""The options of `d2f-stream serve` that bound what it takes on: one table, of which all is made.

Each is a field of ServeLimits, Timeouts or ServeSettings, whose defaults and meanings they are; the
table in docs/serving.md is this one, and a test compares both.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from d2f_stream.core.errors import InvalidParams
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.settings import ServeSettings, Timeouts

__all__ = ["OPTIONS", "Option", "add_options", "limits_of", "timeouts_of"]

MAX_SECONDS: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    Attributes:
        flag: its name.
        field: that it sets; of ServeLimits, or Timeouts, or else of ServeSettings.
        text: what it bounds.
    """

    flag: str
    field: str
    text: str

    @property
    def default(self) -> int | float | None:
        """Its value where it is not given."""
        for holder in (ServeLimits(), Timeouts(), ServeSettings()):
            if hasattr(holder, self.field):
                value: int | float | None = getattr(holder, self.field)
                return value
        raise AttributeError(self.field)

    @property
    def in_seconds(self) -> bool:
        """Whether it is a time."""
        return self.field.endswith("_s")

    def check(self, value: float | None) -> None:
        """Refuse a value out of range.

        Raises:
            InvalidParams: names the option.
        """
        if value is None:
            return
        if self.in_seconds and not 0.0 <= value <= MAX_SECONDS:  # False for NaN too
            raise InvalidParams(self.flag, value, "between 0 and 86400 seconds")
        if not self.in_seconds and value < 1:
            raise InvalidParams(self.flag, value, "at least 1")


OPTIONS: Final = (
    Option("--max-message-bytes", "max_message_bytes", "one incoming message or HTTP body"),
    Option("--max-prompt-tokens", "max_prompt_tokens", "one prompt"),
    Option("--max-new-tokens", "max_new_tokens", "one answer"),
    Option("--max-streams", "max_streams", "answers that run or wait"),
    Option("--max-streams-per-client", "max_streams_per_client", "of those, one client's"),
    Option(
        "--max-streams-per-connection", "max_streams_per_connection", "answers one websocket reads"
    ),
    Option("--max-running", "max_running", "answers worked on at once; clients take turns"),
    Option(
        "--max-running-per-client",
        "max_running_per_client",
        "of those, one client's; else three quarters",
    ),
    Option(
        "--max-running-tokens",
        "max_running_tokens",
        "prompt and answer tokens of all that run or wait",
    ),
    Option(
        "--max-running-tokens-per-client",
        "max_running_tokens_per_client",
        "of those, one client's; else three quarters",
    ),
    Option("--requests-per-minute", "requests_per_minute", "requests of one client"),
    Option("--max-sockets", "max_sockets", "connections of all kinds; fewer where files are few"),
    Option("--max-connections", "max_connections", "websockets"),
    Option("--max-connections-per-client", "max_connections_per_client", "of those, one client's"),
    Option(
        "--max-idle-connections",
        "max_idle_connections",
        "connections without a whole request, and between two; the oldest goes",
    ),
    Option(
        "--max-unauthenticated",
        "max_unauthenticated",
        "websockets that have shown no token yet; the oldest goes",
    ),
    Option("--max-failed-logins", "max_failed_logins", "wrong tokens before a connection closes"),
    Option(
        "--max-bad-messages", "max_bad_messages", "unreadable messages before a connection closes"
    ),
    Option(
        "--max-retained-bytes",
        "max_retained_bytes",
        "ended answers kept; whoever has most loses the oldest",
    ),
    Option("--resume-ttl", "resume_ttl_s", "keep an ended answer for its reader"),
    Option("--auth-timeout", "auth_timeout_s", "for a websocket to show its token"),
    Option("--request-timeout", "request_s", "to send a whole request"),
    Option("--keep-alive", "keep_alive_s", "between two requests of a connection"),
    Option("--stall-timeout", "stall_timeout_s", "for a reader to take what is sent"),
    Option("--ping-interval", "ping_s", "between websocket pings, and to answer one"),
    Option("--close-timeout", "close_s", "for a peer to confirm a close"),
    Option("--stuck-after", "stuck_s", "of one step, until /healthz says stuck"),
    Option("--shutdown-deadline", "shutdown_deadline_s", "let answers end when asked to stop"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all of them to the command."""
    group = parser.add_argument_group("limits")
    for option in OPTIONS:
        kind: Callable[[str], float] = float if option.in_seconds else int
        default = option.default
        shown = option.text if default is None else f"{option.text} (%(default)s)"
        metavar = "S" if option.in_seconds else "N"
        group.add_argument(
            option.flag,
            type=kind,
            default=default,
            metavar=metavar,
            help=shown,
            dest=option.field,
        )


def limits_of(args: argparse.Namespace) -> ServeLimits:
    """Return the limits that the arguments ask for.

    Raises:
        InvalidParams: one is out of range.
    """
    return ServeLimits(**_values(args, ServeLimits))


def timeouts_of(args: argparse.Namespace) -> Timeouts:
    """Return the timeouts that the arguments ask for.

    Raises:
        InvalidParams: one is out of range.
    """
    # The connection is cut a while after the limit that tells why.
    stall_s = args.stall_timeout_s + Timeouts().stall_s - ServeLimits().stall_timeout_s
    return Timeouts(**_values(args, Timeouts), stall_s=stall_s)


def _values(args: argparse.Namespace, holder: type[object]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for option in OPTIONS:
        option.check(getattr(args, option.field))
        if hasattr(holder, option.field):
            values[option.field] = getattr(args, option.field)
    return values
