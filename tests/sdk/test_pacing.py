from collections.abc import AsyncIterator

import pytest

from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend
from d2f_runtime.engine.local import LocalEngine
from d2f_stream.core.errors import EngineFailed
from d2f_stream.core.events import Draft, Event, StreamFailed, StreamFinished
from d2f_stream.terminal.pacing import paced


class Clock:
    """Counts pauses instead of taking them."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)


async def stream(backend: ScriptedBackend) -> AsyncIterator[Event]:
    async with LocalEngine.over(backend, ByteCodec()) as engine:
        async for event in engine.generate("?", drafts=True, max_active_blocks=2).events():
            yield event


async def test_every_step_is_preceded_by_a_pause_and_no_event_is_lost() -> None:
    clock = Clock()
    backend = ScriptedBackend("seven and eight", tokens_per_step=3)
    shown = [event async for event in paced(stream(backend), 0.5, sleep=clock.sleep)]
    end = shown[-1]
    assert isinstance(end, StreamFinished)
    assert clock.pauses == [0.5] * end.usage.steps
    durable = [event.seq for event in shown if not isinstance(event, Draft)]
    assert durable == list(range(len(durable)))


async def test_an_error_of_the_stream_comes_through() -> None:
    async def failing() -> AsyncIterator[Event]:
        yield StreamFailed(stream="s", seq=0, code="x", message="shown first")
        raise EngineFailed("broken")

    shown = paced(failing(), 0.5)
    assert isinstance(await anext(shown), StreamFailed)
    with pytest.raises(EngineFailed, match="broken"):
        await anext(shown)
