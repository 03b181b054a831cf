"""PeerLog: what peers do wrong, in short lines, and never more of them than a person can read.

Whoever can connect can make a server write such lines, so their number must not be his to choose:
a burst of each kind is written, then one now and then, with the number of those left out.
"""

import logging
import time
from collections.abc import Callable
from typing import Any, Final

from d2f_stream.core.printable import printable

__all__ = ["OneLine", "PeerLog"]

MAX_CHARACTERS: Final = 2000
BURST: Final = 5
INTERVAL_S: Final = 10.0


class PeerLog:
    """Writes lines about peers to a logger.

    Args:
        logger: where to.
        burst: lines of one kind that may follow each other.
        interval_s: after so long without it one more may be written, seconds.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        logger: logging.Logger,
        *,
        burst: int = BURST,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._burst = burst
        self._interval_s = interval_s
        self._clock = clock
        self._kinds: dict[str, _Kind] = {}  # by text: as many as the code has calls

    def info(self, text: str, *values: object) -> None:
        """Write a line; `values` are escaped and cut."""
        self._log(logging.INFO, text, values)

    def warning(self, text: str, *values: object) -> None:
        """Write a line that the server's owner should see."""
        self._log(logging.WARNING, text, values)

    def _log(self, level: int, text: str, values: tuple[object, ...]) -> None:
        if not self._logger.isEnabledFor(level):
            return
        kind = self._kinds.setdefault(text, _Kind(self._burst))
        now_s = self._clock()
        kind.left = min(self._burst, kind.left + (now_s - kind.at_s) / self._interval_s)
        kind.at_s = now_s
        if kind.left < 1:
            kind.num_left_out += 1
            return
        kind.left -= 1
        more, kind.num_left_out = kind.num_left_out, 0
        line = text + (f" ({more} more of these were left out)" if more else "")
        self._logger.log(level, line, *map(printable, values))


class OneLine(logging.Formatter):
    """Formats a record so that nothing in it can look like another: its lines are its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line without its traceback."""
        record.message = printable(record.message, MAX_CHARACTERS)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        """Return a traceback that is indented, whatever its errors say."""
        lines = super().formatException(ei).splitlines()
        return "\n".join("    " + printable(line, MAX_CHARACTERS) for line in lines)


class _Kind:
    def __init__(self, burst: int) -> None:
        self.left = float(burst)
        self.at_s = 0.0
        self.num_left_out = 0
