"""Whatever users do in whatever order, with steps held and let go: the events keep their rules."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend, StepGate
from d2f_runtime.engine.local import Limits, LocalEngine
from d2f_stream.core.errors import D2FError, EngineClosed
from d2f_stream.core.events import Block, Draft, Event, StreamFailed, StreamFinished, StreamStarted
from d2f_stream.core.params import GenerationParams
from d2f_stream.core.session import Session
from fakes import check_clean, turn

ALPHABET = "ab .—🙂"


@dataclass(frozen=True)
class Ask:
    answer: str
    params: GenerationParams


@dataclass(frozen=True)
class Cancel:
    number: int


@dataclass(frozen=True)
class Read:
    number: int
    events: int


@dataclass(frozen=True)
class Let:
    steps: int


Action = Ask | Cancel | Read | Let
NUMBERS = st.integers(0, 5)
ASKS = st.builds(
    Ask,
    st.text(ALPHABET, max_size=60),
    st.builds(
        GenerationParams,
        max_new_tokens=st.integers(1, 80),
        block_size=st.sampled_from([1, 2, 8]),
        max_active_blocks=st.sampled_from([None, 2]),
        temperature=st.sampled_from([0.0, 0.8]),
        stop=st.lists(st.text(ALPHABET, min_size=1, max_size=3), max_size=2).map(tuple),
        drafts=st.booleans(),
    ),
)
ACTIONS: st.SearchStrategy[Action] = st.one_of(
    ASKS,
    ASKS,
    st.builds(Cancel, NUMBERS),
    st.builds(Read, NUMBERS, st.integers(1, 30)),
    st.builds(Let, st.integers(1, 6)),
    st.builds(Let, st.integers(1, 6)),
)


@dataclass
class Reader:
    """A user who reads so many events at a time, and all of them in the end."""

    session: Session
    asked: Ask
    cancelled: bool = False
    events: list[Event] = field(default_factory=list)
    error: D2FError | None = None
    _wanted: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    _all: bool = False

    def read(self, number: int) -> None:
        for _ in range(number):
            self._wanted.release()

    def read_all(self) -> None:
        self._all = True
        self._wanted.release()

    async def run(self) -> None:
        events = self.session.events()
        try:
            while True:
                if not self._all:
                    await self._wanted.acquire()
                self.events.append(await anext(events))
        except StopAsyncIteration:
            pass
        except D2FError as error:
            self.error = error


async def play(
    engine: LocalEngine, gate: StepGate, actions: Sequence[Action], *, close_first: bool
) -> list[Reader]:
    readers: list[Reader] = []
    async with engine, asyncio.TaskGroup() as tasks:
        for action in actions:
            match action:
                case Ask(_, params):
                    session = engine.generate(f"prompt {len(readers)}", params)
                    readers.append(Reader(session, action))
                    tasks.create_task(readers[-1].run())
                case Cancel(number) if number < len(readers):
                    readers[number].session.cancel()
                    readers[number].cancelled = True
                case Read(number, events) if number < len(readers):
                    readers[number].read(events)
                case Let(steps):
                    gate.let_through(steps)
                    await asyncio.to_thread(lambda: None)  # other threads have time to run
                case _:
                    pass
            await turn()
        if close_first:
            engine.shut()
        gate.open()
        for reader in readers:
            reader.read_all()
    return readers


def expected(asked: Ask) -> str:
    text = asked.answer.encode()[: asked.params.max_new_tokens].decode(errors="replace")
    ends = [text.find(stop) for stop in asked.params.stop if stop in text]
    return text[: min(ends)] if ends else text


def check(reader: Reader, *, closed: bool) -> None:
    durable = [event for event in reader.events if not isinstance(event, Draft)]
    blocks = [event for event in durable if isinstance(event, Block)]
    if reader.error is not None:
        assert closed
        assert isinstance(reader.error, EngineClosed)
        assert not durable
        return
    assert isinstance(durable[0], StreamStarted)
    assert [event.seq for event in durable] == list(range(len(durable)))
    assert not any(isinstance(event, StreamFinished | StreamFailed) for event in durable[:-1])
    assert [block.index for block in blocks] == list(range(len(blocks)))
    assert [block.start for block in blocks] == [0, *(block.stop for block in blocks)][:-1]
    assert [block.steps for block in blocks] == sorted(block.steps for block in blocks)
    text = "".join(block.text for block in blocks)
    assert text == reader.session.text
    assert expected(reader.asked).startswith(text)
    end = durable[-1]
    if isinstance(end, StreamFailed):
        assert closed
        assert end.code == EngineClosed.code
        return
    assert isinstance(end, StreamFinished)
    assert end.text_length == len(text)
    assert end.usage.completion_tokens == sum(len(block.token_ids) for block in blocks)
    assert end.usage.steps >= max((block.steps for block in blocks), default=0)
    if end.reason == "cancelled":
        assert reader.cancelled
    else:
        assert text == expected(reader.asked)
        assert end.usage.steps == blocks[-1].steps


@settings(max_examples=120)
@given(
    actions=st.lists(ACTIONS, min_size=3, max_size=25),
    tokens_per_step=st.integers(1, 12),
    max_rows=st.integers(1, 3),
    max_sessions=st.integers(1, 4),
    close_first=st.booleans(),
)
def test_events_keep_their_rules_whatever_users_do(
    actions: list[Action],
    tokens_per_step: int,
    max_rows: int,
    max_sessions: int,
    close_first: bool,
) -> None:
    asks = [action for action in actions if isinstance(action, Ask)]
    gate = StepGate()
    backend = ScriptedBackend(
        {f"prompt {i}": ask.answer for i, ask in enumerate(asks)},
        tokens_per_step=tokens_per_step,
        gate=gate,
    )
    limits = Limits(max_rows=max_rows, max_sessions=max_sessions)
    engine = LocalEngine.over(backend, ByteCodec(), limits=limits)
    readers = asyncio.run(play(engine, gate, actions, close_first=close_first))
    check_clean(backend)
    assert len(readers) == len(asks)
    for reader in readers:
        check(reader, closed=close_first)
