"""Answers that are read while what they come from is killed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import d2f_stream
from d2f_stream.core.events import Block, Event, StreamFinished, StreamStarted

NUM_TOKENS = 400
ANSWER = ("on and " * NUM_TOKENS)[:NUM_TOKENS]


@asynccontextmanager
async def answering(url: str, *, number: int = 8) -> AsyncIterator["Answers"]:
    """Sessions of the SDK behind the port, which read while the test goes on."""
    async with d2f_stream.connect(url) as engine:
        answers = Answers(engine, number=number)
        yield answers
        await answers.check()


class Answers:
    def __init__(self, engine: d2f_stream.Engine, *, number: int) -> None:
        self.events: list[list[Event]] = [[] for _ in range(number)]
        self.longest_pause_s = 0.0
        self._tasks = [asyncio.create_task(self._read(engine, events)) for events in self.events]

    @property
    def num_running(self) -> int:
        """Answers that have not ended yet."""
        return sum(not task.done() for task in self._tasks)

    async def wait_blocks(self, number: int) -> None:
        """Wait until every answer has so many more blocks, or has ended."""
        wanted = [len(events) + number for events in self.events]
        while any(  # noqa: ASYNC110 - the events of many streams, none of which is waited for
            len(events) < number and not task.done()
            for events, number, task in zip(self.events, wanted, self._tasks, strict=True)
        ):
            await asyncio.sleep(0.005)

    async def check(self) -> None:
        """Wait for the ends; nothing is lost, doubled, reordered, or other than it would be."""
        async with asyncio.timeout(60.0):
            await asyncio.gather(*self._tasks)
        for events in self.events:
            assert [event.seq for event in events if hasattr(event, "seq")] == list(
                range(len(events))
            )
            assert isinstance(events[0], StreamStarted)
            assert isinstance(events[-1], StreamFinished)
            assert events[-1].text_length == NUM_TOKENS
            assert "".join(e.text for e in events if isinstance(e, Block)) == ANSWER

    async def _read(self, engine: d2f_stream.Engine, events: list[Event]) -> None:
        clock = asyncio.get_running_loop().time
        session = engine.generate("hi", max_new_tokens=NUM_TOKENS)
        then_s = clock()
        async for event in session.events():
            events.append(event)
            self.longest_pause_s = max(self.longest_pause_s, clock() - then_s)
            then_s = clock()
