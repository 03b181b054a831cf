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

    @rule(work=works, text=st.sampled_from(("x", "other")))
    def append_next(self, work: Work, text: str) -> None:
        """A worker's next event is taken, unless another has the stream or has told otherwise."""
        stream, seq = work.stream_id, len(work.events)
        written = self.written[stream]
        is_behind = seq < len(written)  # others went on with the stream, before it knew
        if self._ended(stream) and not is_behind:
            return
        event = events_of(stream, num_blocks=NUM_BLOCKS, text=text)[seq]
        is_anothers = work.is_lost or self.holders.get(stream, work) is not work
        is_due = not is_anothers and (not is_behind or event == written[seq])
        assert self.run(work.append(event)) == is_due
        if is_due and not is_behind:
            written.append(event)
            self.holders[stream] = work
            if self._ended(stream):
                self.holders.pop(stream)

    @rule(work=works, seq=st.integers(0, NUM_BLOCKS))
    def append_another(self, work: Work, seq: int) -> None:
        """An event that was taken is not changed by anybody."""
        if seq < len(self.written[work.stream_id]):
            other = events_of(work.stream_id, num_blocks=NUM_BLOCKS, text="third")[seq]
            if other != self.written[work.stream_id][seq]:
                assert not self.run(work.append(other))

    @rule(work=works)
    def give_back(self, work: Work) -> None:
        self.run(work.__aexit__(None, None, None))
        if self.holders.get(work.stream_id) is work:
            del self.holders[work.stream_id]
        self.believed = {key: held for key, held in self.believed.items() if held is not work}

    @rule(stream=streams, side=sides, waits=st.booleans())
    def let_lease_run_out(self, stream: str, side: int, waits: bool) -> None:
        """Nobody works for the stream then, whether or not a server waits for a worker."""
        if self.url is None or self._ended(stream):
            return
        log: Any = self.logs[side]
        lease = f"{log.keys.prefix}:l:{stream}"
        command = ("SET", lease, f"?{log.holder}") if waits else ("DEL", lease)
        self.run(log.store.run(*command, patience_s=5.0))
        self.holders.pop(stream, None)

    @rule(side=sides)
    def beat(self, side: int) -> None:
        """A worker learns that it has lost its stream, or has one back that nobody took."""
        if self.url is None:
            return
        log: Any = self.logs[side]
        works = {s: w for (at, s), w in self.believed.items() if at == side and not w.is_lost}
        self.run(log._beats._beat())
        for stream, work in works.items():
            if not self._ended(stream):
                assert work.is_lost == (self.holders.setdefault(stream, work) is not work)

    @rule(stream=streams, side=sides)
    def read_whole(self, stream: str, side: int) -> None:
        """Whoever reads has every event, once and in order."""
        believed = self.believed.get((side, stream))
        if believed is not None and list(believed.events) != self.written[stream]:
            return  # others went on with the stream, which it learns by its next event
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
