"""Endings: the last events of a stream that no engine says, since none works for it. Pure."""

from collections.abc import Sequence

from d2f_stream.core.errors import D2FError
from d2f_stream.core.events import (
    Block,
    Event,
    StreamFailed,
    StreamFinished,
    StreamStarted,
    Timings,
    Usage,
)
from d2f_stream.core.session import Engine
from d2f_stream.server.streams.served_stream import ServedStream

__all__ = ["cancelled", "failed"]


def cancelled(stream: ServedStream, engine: Engine) -> tuple[Event, ...]:
    """Return what follows the events of a stream that was cancelled while it waited.

    It begins like any other: only that tells its client which request it is of.
    """
    events: Sequence[Event] = stream.log or (_started(stream, engine),)
    first = events[0]
    blocks = [event for event in events if isinstance(event, Block)]
    finished = StreamFinished(
        stream=stream.id,
        seq=len(events),
        reason="cancelled",
        text_length=sum(len(block.text) for block in blocks),
        usage=Usage(
            prompt_tokens=first.prompt_tokens if isinstance(first, StreamStarted) else 0,
            completion_tokens=sum(len(block.token_ids) for block in blocks),
            steps=blocks[-1].steps if blocks else 0,
        ),
        timings=Timings(
            first_block_ms=blocks[0].elapsed_ms if blocks else None,
            total_ms=blocks[-1].elapsed_ms if blocks else 0.0,
        ),
    )
    return (*events[len(stream.log) :], finished)


def failed(stream: ServedStream, error: D2FError) -> StreamFailed:
    """Return what follows the events of a stream that nobody brings to its end."""
    return StreamFailed(stream=stream.id, seq=len(stream.log), code=error.code, message=str(error))


def _started(stream: ServedStream, engine: Engine) -> StreamStarted:
    return StreamStarted(
        stream=stream.id,
        seq=0,
        request_id=stream.request_id,
        model=engine.info.name,
        block_size=engine.defaults.block_size,
        prompt_tokens=0,
    )
