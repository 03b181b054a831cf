"""Ending tasks that a library may keep: cancelled until they have ended."""

import asyncio
from typing import Any, Final

__all__ = ["end_tasks"]

AGAIN_S: Final = 0.5  # after which a cancellation counts as lost


async def end_tasks(*tasks: "asyncio.Task[Any]") -> None:
    """Cancel tasks until all have ended: a library may take a cancellation for its own timeout.

    Being cancelled meanwhile is raised after they have.
    """
    pending, cancelled = {task for task in tasks if not task.done()}, None
    while pending:
        for task in pending:
            task.cancel()
        try:
            _, pending = await asyncio.wait(pending, timeout=AGAIN_S)
        except asyncio.CancelledError as error:
            cancelled = error
            pending = {task for task in pending if not task.done()}
    if cancelled is not None:
        raise cancelled
