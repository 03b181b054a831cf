"""Simulates a cluster: engines, the log's one store, and servers, of which each routes for itself.

Answers are asked for at random times, independent of one another, and dealt to the servers in turn.

- A server is a core: it spends its time on an answer (which holds the router: Ray's handle chooses
  in the process that calls) when it is asked, and on a block when the store has it.
- The store is a core: it spends its time on an answer before an engine gets it, on a block when an
  engine has made it, and every half second on the lease and the readers of each running answer.
- The router picks the engine with fewer answers of two.
- An engine runs so many answers at once, in turns, at the pace that it has with so many; the others
  wait in line.

What comes to a core is done in order, in one piece, and takes the same time each. Networks take no
time, and engines have cores for what is theirs.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["Costs", "EngineModel", "Outcome", "carried", "simulate"]

BEAT_S: Final = 0.5
"""Between two renewals of a lease (`lab.cluster.costs` has what they cost in a second)."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What the parts spend of a core, microseconds."""

    server_answer: float
    server_block: float
    store_answer: float
    store_block: float
    store_running_s: float


@dataclass(frozen=True, kw_only=True)
class EngineModel:
    """A kind of engine.

    Attributes:
        paces: blocks/s of all answers together, by the number of answers at once, in order; between
            two numbers it is a straight line, and the last is as many as it runs at once.
        answer_blocks: of each answer.
    """

    paces: tuple[tuple[int, float], ...]
    answer_blocks: int

    @property
    def sessions(self) -> int:
        """As many answers as it runs at once."""
        return self.paces[-1][0]

    @property
    def answers_per_s(self) -> float:
        """What it makes when it is full."""
        return self.paces[-1][1] / self.answer_blocks

    def pace(self, number: int) -> float:
        """Return the blocks/s of so many answers at once."""
        few, slow = self.paces[0]
        for many, fast in self.paces:
            if number <= many:
                share = (number - few) / (many - few) if many > few else 1.0
                return slow + share * (fast - slow)
            few, slow = many, fast
        return self.paces[-1][1]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a simulation found.

    Attributes:
        blocks_per_s: that reached readers.
        late_ms: p50 and p99 of a block, from the engine to behind the server.
        busy: share of the time in which a core worked, of servers the mean; of engines, the share
            of the blocks that they make when they are full.
        router: share of the servers' time that was for answers, not for blocks.
        binds: the busiest part.
    """

    blocks_per_s: float
    late_ms: tuple[float, float]
    busy: dict[str, float]
    router: float

    @property
    def binds(self) -> str:
        """The busiest part."""
        return max(self.busy, key=self.busy.__getitem__)

    def to_dict(self) -> dict[str, Any]:
        """Return it for a record."""
        return {
            "blocks_per_s": round(self.blocks_per_s),
            "block_late_ms": {
                "p50": round(self.late_ms[0], 2),
                "p99": round(self.late_ms[1], 2),
            },
            "busy": {name: round(share, 4) for name, share in self.busy.items()},
            "busy_of_servers_for_answers": round(self.router, 4),
            "binds": self.binds,
        }


def carried(costs: Costs, engine: EngineModel, *, load: float) -> dict[str, float]:
    """Return how many engines keep a store, a server, and its routing alone, wholly busy.

    Args:
        costs: of the parts.
        engine: which run beside them.
        load: share of what they make when they are full.
    """
    answers = load * engine.answers_per_s
    running = next(
        (n for n in range(1, engine.sessions) if engine.pace(n) >= load * engine.paces[-1][1]),
        engine.sessions,
    )
    blocks = answers * engine.answer_blocks
    store = answers * costs.store_answer + blocks * costs.store_block
    store += running * costs.store_running_s
    server = answers * costs.server_answer + blocks * costs.server_block
    return {
        "store": 1e6 / store,
        "server": 1e6 / server,
        "router": 1e6 / (answers * costs.server_answer),
    }


@dataclass
class _Core:
    """One thing after another."""

    counts_from: float
    counts_to: float
    free_at: float = 0.0
    worked: float = 0.0

    def work(self, now: float, seconds: float) -> float:
        """Return when it is done with what comes now."""
        begins = max(now, self.free_at)
        self.free_at = begins + seconds
        counted = min(self.free_at, self.counts_to) - max(begins, self.counts_from)
        self.worked += max(0.0, counted)
        return self.free_at

    @property
    def busy(self) -> float:
        """The share of the time that counts."""
        return self.worked / (self.counts_to - self.counts_from)


@dataclass
class _Engine:
    waiting: deque["_Answer"] = field(default_factory=deque)
    running: deque["_Answer"] = field(default_factory=deque)
    number: int = 0  # of answers that were routed to it and are not over
    is_at_work: bool = False


@dataclass
class _Answer:
    server: int
    left: int


class _Clock:
    """What happens, in its order."""

    def __init__(self) -> None:
        self._coming: list[tuple[float, int, Callable[[float], None]]] = []
        self._count = 0

    def at(self, when: float, what: Callable[[float], None]) -> None:
        self._count += 1
        heapq.heappush(self._coming, (when, self._count, what))

    def run(self, until: float) -> None:
        while self._coming and self._coming[0][0] <= until:
            when, _, what = heapq.heappop(self._coming)
            what(when)


class _Cluster:
    """The parts, and the way of an answer and of its blocks through them."""

    def __init__(
        self,
        costs: Costs,
        model: EngineModel,
        *,
        engines: int,
        servers: int,
        seconds: float,
        seed: int,
    ) -> None:
        self.costs = costs
        self.model = model
        self.clock = _Clock()
        self.chance = random.Random(seed)
        self.since, self.until = seconds / 2, seconds
        self.store = _Core(self.since, self.until)
        self.servers = [_Core(self.since, self.until) for _ in range(servers)]
        self.engines = [_Engine() for _ in range(engines)]
        self.num_asked = 0
        self.num_made = 0
        self.late: list[float] = []  # seconds

    def ask_at_random(self, per_s: float) -> None:
        """Ask for so many answers a second from now on."""

        def ask(now: float) -> None:
            answer = _Answer(self.num_asked % len(self.servers), self.model.answer_blocks)
            self.num_asked += 1
            took = self.servers[answer.server].work(now, 1e-6 * self.costs.server_answer)
            self.clock.at(took, lambda at: self._note(answer, at))
            self.clock.at(now + self.chance.expovariate(per_s), ask)

        self.clock.at(self.chance.expovariate(per_s), ask)
        for number, engine in enumerate(self.engines):
            first = BEAT_S * (number + 0.5) / len(self.engines)
            self.clock.at(first, lambda at, engine=engine: self._beat(engine, at))  # type: ignore[misc]

    def _note(self, answer: _Answer, now: float) -> None:
        done = self.store.work(now, 1e-6 * self.costs.store_answer)
        self.clock.at(done, lambda at: self._route(answer, at))

    def _route(self, answer: _Answer, now: float) -> None:
        two = self.chance.sample(self.engines, min(2, len(self.engines)))
        engine = min(two, key=lambda each: each.number)
        engine.number += 1
        engine.waiting.append(answer)
        if not engine.is_at_work:
            self._go_on(engine, now)

    def _go_on(self, engine: _Engine, now: float) -> None:
        while engine.waiting and len(engine.running) < self.model.sessions:
            engine.running.append(engine.waiting.popleft())
        engine.is_at_work = bool(engine.running)
        if engine.is_at_work:
            done = now + 1 / self.model.pace(len(engine.running))
            self.clock.at(done, lambda at: self._made(engine, at))

    def _made(self, engine: _Engine, now: float) -> None:
        self.num_made += now >= self.since
        answer = engine.running.popleft()
        answer.left -= 1
        if answer.left:
            engine.running.append(answer)
        else:
            engine.number -= 1
        stored = self.store.work(now, 1e-6 * self.costs.store_block)
        self.clock.at(stored, lambda at: self._send(answer.server, made=now, now=at))
        self._go_on(engine, now)

    def _send(self, server: int, *, made: float, now: float) -> None:
        sent = self.servers[server].work(now, 1e-6 * self.costs.server_block)
        if self.since <= sent <= self.until:
            self.late.append(sent - made)

    def _beat(self, engine: _Engine, now: float) -> None:
        if engine.running:
            self.store.work(now, 1e-6 * BEAT_S * self.costs.store_running_s * len(engine.running))
        self.clock.at(now + BEAT_S, lambda at: self._beat(engine, at))


def simulate(
    costs: Costs,
    model: EngineModel,
    *,
    engines: int,
    servers: int,
    answers_per_s: float,
    seconds: float,
    seed: int = 0,
) -> Outcome:
    """Run so many engines and servers and a store; the first half of the time is not counted."""
    cluster = _Cluster(costs, model, engines=engines, servers=servers, seconds=seconds, seed=seed)
    cluster.ask_at_random(answers_per_s)
    cluster.clock.run(seconds)
    counted_s = cluster.until - cluster.since
    late = sorted(cluster.late) or [0.0]
    for_blocks = 1e-6 * costs.server_block * len(cluster.late) / counted_s / servers
    busy_servers = sum(core.busy for core in cluster.servers) / servers
    return Outcome(
        blocks_per_s=len(cluster.late) / counted_s,
        late_ms=(1e3 * late[len(late) // 2], 1e3 * late[len(late) * 99 // 100]),
        busy={
            "store": cluster.store.busy,
            "servers": busy_servers,
            "engines": cluster.num_made / counted_s / engines / model.paces[-1][1],
        },
        router=max(0.0, busy_servers - for_blocks),
    )
