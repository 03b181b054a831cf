"""A log under any order of workers that come, are thought dead, and come back."""

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from d2f_stream.core.errors import StreamLost
from d2f_stream.core.events import Event, StreamFinished
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.streams.log import StreamLog, Work
from d2f_stream.server.streams.memory_log import MemoryLog
from d2f_stream.server.streams.served_stream import ServedStream
from stores import ValkeyServer, events_of, request

Result = TypeVar("Result")
NUM_BLOCKS = 4
sides = st.integers(0, 1)


class LogMachine(RuleBasedStateMachine):
    """Two servers over one log, and what the log must hold, which is kept beside it."""

    url: ClassVar[str | None] = None
    streams = Bundle("streams")
    works = Bundle("works")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.stack = contextlib.AsyncExitStack()
        self.ids: dict[str, str] = {}  # of streams, by request
        self.written: dict[str, list[Event]] = {}  # by stream id
        self.holders: dict[str, Work] = {}
        self.believed: dict[tuple[int, str], Work] = {}  # works that a server has not let go of

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self.runner.run(work)

    @initialize()
    def open(self) -> None:
        self.logs = self.run(self._open())

    def teardown(self) -> None:
        self.run(self.stack.aclose())
        self.runner.close()

    @rule(target=streams, name=st.sampled_from("abc"), side=sides)
    def create(self, name: str, side: int) -> str:
        """Whoever asks first makes the stream; everybody else gets the same one."""
        made = self.logs[side].create(request(name), client="ann", asker="ann", clamp=False)
        stream, is_new = self.run(made)
        assert is_new == (name not in self.ids)
        assert self.ids.setdefault(name, stream.id) == stream.id
        self.written.setdefault(stream.id, [])
        return stream.id

    @rule(target=works, stream=streams, side=sides, by_force=st.booleans())
    def take(self, stream: str, side: int, by_force: bool) -> Any:
        """One at a time works for a stream, and none for one that has ended."""
        work = self.run(self.logs[side].work(stream, by_force=by_force))
        is_busy = stream in self.holders or (
            self.url is not None and (side, stream) in self.believed  # it cannot know yet
        )
        assert (work is not None) == (not self._ended(stream) and (by_force or not is_busy))
        if work is None:
            return multiple()
        assert list(work.events) == self.written[stream]
        self.holders[stream] = self.believed[side, stream] = work
        return work

    @rule(work=works)
    def append_next(self, work: Work) -> None:
        """The holder's next event is taken, that of one who lost the stream is not."""
        stream = work.stream_id
        written = self.written[stream]
        if self._ended(stream):
            return
        event = events_of(stream, num_blocks=NUM_BLOCKS)[len(written)]
        if stream not in self.holders and work in self.believed.values():
            self._go_on(work)
        taken = self.run(work.append(event))
        assert taken == (self.holders.get(stream) is work)
        if taken:
            written.append(event)
            if self._ended(stream):
                self.holders.pop(stream)

    @rule(work=works, seq=st.integers(0, NUM_BLOCKS))
    def append_another(self, work: Work, seq: int) -> None:
        """An event that was taken is not changed by anybody."""
        if seq < len(self.written[work.stream_id]):
            other = events_of(work.stream_id, num_blocks=NUM_BLOCKS, text="other")[seq]
            if other != self.written[work.stream_id][seq]:
                assert not self.run(work.append(other))

    @rule(work=works)
    def give_back(self, work: Work) -> None:
        self.run(work.__aexit__(None, None, None))
        if self.holders.get(work.stream_id) is work:
            del self.holders[work.stream_id]
        self.believed = {key: held for key, held in self.believed.items() if held is not work}

    @rule(stream=streams, side=sides)
    def read_whole(self, stream: str, side: int) -> None:
        """Whoever reads has every event, once and in order."""
        believed = self.believed.get((side, stream))
        is_deposed = believed is not None and self.holders.get(stream) is not believed
        if is_deposed and self.url is not None and not self._ended(stream):
            return  # it learns by its next beat that another works, and none comes here
        assert self.run(self._read(stream, side)) == self.written[stream]

    @rule(stream=streams, side=sides)
    def others_do_not_find_it(self, stream: str, side: int) -> None:
        with pytest.raises(StreamLost):
            self.run(self.logs[side].find(stream, client="bob"))

    @invariant()
    def numbers_have_no_gap(self) -> None:
        for events in self.written.values():
            assert [event.seq for event in events if hasattr(event, "seq")] == list(
                range(len(events))
            )

    def _go_on(self, work: Work) -> None:
        """Have a worker hold a stream that was taken from it, and given back before it knew."""
        is_lost = getattr(work, "is_lost", True)  # one in memory knows at once
        if not is_lost and list(work.events) == self.written[work.stream_id]:
            self.holders[work.stream_id] = work

    def _ended(self, stream: str) -> bool:
        events = self.written[stream]
        return bool(events) and isinstance(events[-1], StreamFinished)

    async def _open(self) -> tuple[StreamLog, StreamLog]:
        if self.url is None:
            memory = MemoryLog(ServeLimits())
            return memory, memory
        from d2f_stream.server.streams.valkey.log import ValkeyLog

        # A lease that does not run out between two steps: nothing beats there.
        logs = [ValkeyLog(self.url, ServeLimits(), lease_s=600.0) for _ in range(2)]
        for log in logs:
            await self.stack.enter_async_context(log)
        await logs[0].store.run("FLUSHDB", patience_s=5.0)
        return logs[0], logs[1]

    async def _read(self, stream: str, side: int) -> list[Event]:
        copy: ServedStream = await self.logs[side].find(stream, client="ann")
        events: list[Event] = []
        reading = copy.follow()
        async with asyncio.timeout(5.0):
            while len(events) < len(self.written[stream]):
                events.append(await anext(reading))
        await reading.aclose()  # type: ignore[attr-defined]
        return events + copy.log[len(events) :]


@pytest.mark.parametrize("kind", ["memory", "valkey"])
def test_log_keeps_every_event_once_whoever_works_and_whoever_reads(
    kind: str, request: pytest.FixtureRequest
) -> None:
    class Machine(LogMachine):
        pass

    if kind == "valkey":
        store: ValkeyServer = request.getfixturevalue("store")
        Machine.url = f"{store.url}/15"
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=60 if kind == "memory" else 25,
            phases=[Phase.generate],
            stateful_step_count=30,
            suppress_health_check=list(HealthCheck),
        ),
    )
