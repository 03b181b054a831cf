"""Served: what a server has loaded, in a line of text; one that cannot be reached is a line too."""

import asyncio
from typing import Final

from d2f_stream.core.errors import D2FError

__all__ = ["served"]

PATIENCE_S: Final = 5.0  # of somebody who wants to see a list


def served(server: str, token: str | None = None, *, patience_s: float = PATIENCE_S) -> str:
    """Ask a server for its model, and say which it is. Never raises for what the server does.

    Args:
        server: its address, as `d2f_stream.connect` takes it.
        token: where it asks for one.
        patience_s: seconds, after which it counts as unreachable.
    """
    try:
        return asyncio.run(_asked(server, token, patience_s))
    except TimeoutError:
        return f"{server} did not answer within {patience_s:.0f} s"
    except D2FError as error:
        return f"{server} does not tell what it serves: {' '.join(str(error).split())}"


async def _asked(server: str, token: str | None, patience_s: float) -> str:
    from d2f_stream.api import connect

    async with asyncio.timeout(patience_s), connect(server, token=token) as engine:
        info = engine.info
        about = [f"{info.max_len:,} tokens of context", info.license, info.description]
        return f"{server} serves {info.name}: {', '.join(filter(None, about))}"
