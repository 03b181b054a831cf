"""What the terminal says while the connection to a server is lost."""

import logging
import sys

__all__ = ["tell_of_losses"]


class _Teller(logging.Handler):
    """Writes what the client logs of lost connections to the standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; other records are left to their own handlers."""
        if getattr(record, "lost", False):
            sys.stderr.write(f"d2f-stream: {record.getMessage()}; reconnecting ...\n")


def tell_of_losses() -> None:
    """Let every lost connection of this process's clients be told at once. Idempotent."""
    logger = logging.getLogger("d2f_stream.client")
    if not any(isinstance(handler, _Teller) for handler in logger.handlers):
        logger.addHandler(_Teller(logging.INFO))
        logger.setLevel(min(logging.INFO, logger.getEffectiveLevel()))
