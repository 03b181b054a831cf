"""Plans of word problems: the numbers and the wording chosen, before any text is written.

Owns the bounds of the numbers and the identity of a combination. Only `Random.random` is drawn
from, whose stream Python promises to keep, so a seed gives the same plans in every process and
version.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final, Literal

from lab.embedded_model import phrasings
from lab.embedded_model.cast import ITEMS, PEOPLE, RELATIONS, Item, Kind, Person
from lab.embedded_model.frames import CLOSINGS, DISTRACTORS, LEADS, OPENINGS, Distractor
from lab.embedded_model.phrasings import Phrasing

MIN_OPERATIONS: Final = 2
MAX_OPERATIONS: Final = 6
MAX_VALUE: Final = 999
MAX_FACTOR: Final = 12
DISTRACTOR_SHARE: Final = 0.2

_LEAD_SHARE: Final = 0.3
_JOIN_SHARE: Final = 0.3  # of the places where two sentences can be joined

Symbol = Literal["+", "-", "x", "/"]
_SYMBOLS: Final[tuple[Symbol, ...]] = ("+", "-", "x", "/")


@dataclass(frozen=True, slots=True)
class Choice:
    """A phrasing with its identity and what follows from its wording."""

    phrasing: Phrasing
    identity: str
    takes_lead: bool
    is_simple: bool


@dataclass(slots=True)
class Step:
    """One operation: `before symbol operand = after`, and how it is told."""

    symbol: Symbol
    choice: Choice
    before: int
    operand: int
    after: int
    relation: str
    lead: str = ""
    is_joined: bool = False


@dataclass(slots=True)
class Aside:
    """A distractor with its number, told before the step at that index."""

    distractor: Distractor
    number: int
    relation: str
    before_step: int


@dataclass(slots=True)
class Plan:
    """Everything that the text of a problem depends on."""

    person: Person
    friend: str
    item: Item
    relation: str
    opening: int
    closing: int
    start: int
    steps: list[Step]
    aside: Aside | None

    @property
    def key(self) -> str:
        """Name the combination of phrasings and numbers.

        People, objects, lead-ins and the distractor are left out, so problems that differ only in
        those share a key.
        """
        steps = " ".join([f"{step.choice.identity}:{step.operand}" for step in self.steps])
        return f"o{self.opening}:{self.start} {steps} c{self.closing}"


def draw_plan(rng: Random) -> Plan:
    """Draw a plan of 2 to 6 operations, every value in it within 1..999."""
    draw = rng.random
    person = int(draw() * len(PEOPLE))
    friend = (person + 1 + int(draw() * (len(PEOPLE) - 1))) % len(PEOPLE)
    item = ITEMS[int(draw() * len(ITEMS))]
    opening = int(draw() * len(OPENINGS))
    start = _skewed(draw(), OPENINGS[opening].high)
    steps = _draw_steps(draw, item.kind, start)
    aside = _draw_aside(draw, len(steps)) if draw() < DISTRACTOR_SHARE else None
    _draw_connectives(draw, steps, aside.before_step if aside else 0)
    return Plan(
        person=PEOPLE[person],
        friend=PEOPLE[friend].name,
        item=item,
        relation=_draw_relation(draw),
        opening=opening,
        closing=int(draw() * len(CLOSINGS)),
        start=start,
        steps=steps,
        aside=aside,
    )


def choices(symbol: Symbol, kind: Kind) -> tuple[Choice, ...]:
    """List the phrasings that may tell an operation on this kind of object."""
    return _CHOICES[kind][symbol]


def _draw_steps(draw: Callable[[], float], kind: Kind, value: int) -> list[Step]:
    num_operations = MIN_OPERATIONS + int(draw() * (MAX_OPERATIONS - MIN_OPERATIONS + 1))
    steps: list[Step] = []
    used: set[str] = set()
    while len(steps) < num_operations:
        symbol = _SYMBOLS[int(draw() * 4)]
        operand = _operand(draw(), symbol, value)
        # Equal operands in a row would often undo each other: four times as many, then a quarter.
        if operand == 0 or (steps and steps[-1].operand == operand):
            continue
        choice = _draw_choice(draw, _CHOICES[kind][symbol], operand, used)
        after = _apply(symbol, value, operand)
        steps.append(Step(symbol, choice, value, operand, after, _draw_relation(draw)))
        used.add(choice.identity)
        value = after
    return steps


def _draw_choice(
    draw: Callable[[], float], pool: tuple[Choice, ...], operand: int, used: set[str]
) -> Choice:
    # NOTE: ends because every pool has at least six phrasings that fit any operand.
    while True:
        choice = pool[int(draw() * len(pool))]
        phrasing = choice.phrasing
        if phrasing.low <= operand <= phrasing.high and choice.identity not in used:
            return choice


def _draw_relation(draw: Callable[[], float]) -> str:
    return RELATIONS[int(draw() * len(RELATIONS))]


def _draw_aside(draw: Callable[[], float], num_steps: int) -> Aside:
    distractor = DISTRACTORS[int(draw() * len(DISTRACTORS))]
    number = distractor.low + int(draw() * (distractor.high - distractor.low + 1))
    return Aside(distractor, number, _draw_relation(draw), int(draw() * num_steps))


def _draw_connectives(draw: Callable[[], float], steps: list[Step], unjoinable: int) -> None:
    """Join some neighbouring steps into one sentence and give others a lead-in."""
    previous: Step | None = None
    for index, step in enumerate(steps):
        if step.choice.takes_lead:
            if index != unjoinable and _ends_openly(previous) and draw() < _JOIN_SHARE:
                step.is_joined = True
            elif previous is not None and not previous.lead and draw() < _LEAD_SHARE:
                step.lead = LEADS[int(draw() * len(LEADS))]
        previous = step


def _ends_openly(step: Step | None) -> bool:
    return step is not None and step.choice.is_simple and not step.is_joined and not step.lead


def _skewed(uniform: float, high: int) -> int:
    """Map 0..1 to 2..high; three in five results are below 40, evenly."""
    if uniform < 0.6:
        return 2 + int(min(high - 1, 38) * uniform / 0.6)
    upper = (uniform - 0.6) / 0.4
    return 2 + int((high - 1) * upper * upper)


def _operand(uniform: float, symbol: Symbol, value: int) -> int:
    """Map 0..1 to an operand that keeps the result within bounds; 0 if there is none."""
    match symbol:
        case "+":
            high = MAX_VALUE - value
            return _skewed(uniform, high) if high >= 2 else 0
        case "-":
            return _skewed(uniform, value - 1) if value >= 3 else 0
        case "x":
            high = min(MAX_FACTOR, MAX_VALUE // value)
            return 2 + int((high - 1) * uniform) if high >= 2 else 0
        case "/":
            divisors = _DIVISORS[value]
            return divisors[int(len(divisors) * uniform)] if divisors else 0


def _apply(symbol: Symbol, value: int, operand: int) -> int:
    match symbol:
        case "+":
            return value + operand
        case "-":
            return value - operand
        case "x":
            return value * operand
        case "/":
            return value // operand


def _choices(symbol: Symbol, pool: tuple[Phrasing, ...], kind: Kind) -> tuple[Choice, ...]:
    return tuple(
        Choice(
            phrasing,
            f"{symbol}{index}",
            takes_lead=not phrasing.question[0].isupper(),
            is_simple=not any(mark in phrasing.question for mark in (",", " and ", " but ")),
        )
        for index, phrasing in enumerate(pool)
        if phrasing.only in (None, kind)
    )


_POOLS: Final[dict[Symbol, tuple[Phrasing, ...]]] = {
    "+": phrasings.ADDITIONS,
    "-": phrasings.SUBTRACTIONS,
    "x": phrasings.MULTIPLICATIONS,
    "/": phrasings.DIVISIONS,
}
_CHOICES: Final = {
    kind: {symbol: _choices(symbol, pool, kind) for symbol, pool in _POOLS.items()} for kind in Kind
}
_DIVISORS: Final = tuple(
    tuple(factor for factor in range(2, MAX_FACTOR + 1) if value % factor == 0)
    for value in range(MAX_VALUE + 1)
)
