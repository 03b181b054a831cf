"""What surrounds the operations of a word problem: openings, closings, distractors and lead-ins.

Owns wording only, with the slots that phrasings.py lists, and {a} and {d}: the first number and
the number of the distractor.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Opening:
    """Tells the first number, 2..high, in the question and again in the answer."""

    question: str
    answer: str
    high: int = 999


@dataclass(frozen=True, slots=True)
class Distractor:
    """A sentence whose number, low..high, changes nothing."""

    question: str
    low: int
    high: int


OPENINGS: Final = (
    Opening("{name} has {a} {objs}", "At first {name} has {a} {objs}."),
    Opening("{name} starts the day with {a} {objs}", "{name} starts with {a} {objs}."),
    Opening("There are {a} {objs} in {name}'s basket", "The basket holds {a} {objs}.", high=200),
    Opening("This morning, {name} counted {a} {objs}", "{name} counted {a} {objs} at first."),
    Opening("At the market, {name} buys {a} {objs}", "{name} first buys {a} {objs}."),
    Opening("{name}'s {rel} gives {him} a box of {a} {objs}", "The box holds {a} {objs}."),
    Opening("For the fair, {name} brings {a} {objs}", "At first there are {a} {objs}."),
    Opening("In {his} bag, {name} finds {a} {objs}", "The bag has {a} {objs}.", 150),
    Opening("{name} sets out {a} {objs} at a stall", "The stall has {a} {objs}."),
    Opening("It is Monday, and {name} has {a} {objs}", "On Monday {name} has {a} {objs}."),
    Opening("{name} loves {objs} and has {a} of them", "{name} starts with {a} {objs}."),
    Opening("For a party, {name} gets {a} {objs}", "At first {name} has {a} {objs}."),
    Opening("On {name}'s table are {a} {objs}", "The table holds {a} {objs}."),
)

CLOSINGS: Final = (
    "How many {objs} does {name} have now?",
    "How many {objs} does {he} have in the end?",
    "How many {objs} does {name} end up with?",
    "Work out how many {objs} {name} has now.",
    "What is the number of {objs} {he} has now?",
    "Find the number of {objs} {name} has now.",
    "Can you tell how many {objs} {he} has now?",
    "After all this, how many {objs} does {he} have?",
    "How many {objs} does that leave {him} with?",
    "So how many {objs} does {name} have in the end?",
)

DISTRACTORS: Final = (
    Distractor("{his} little brother is {d} years old", 2, 9),
    Distractor("the shop opened {d} years ago", 2, 150),
    Distractor("the bus ride costs {d} dollars", 2, 9),
    Distractor("{name} lives at number {d}", 1, 250),
    Distractor("the way home takes {d} minutes", 2, 90),
    Distractor("{friend} is reading a book of {d} pages", 30, 999),
    Distractor("{friend} can count to {d}", 20, 999),
    Distractor("{his} school has {d} students", 80, 999),
    Distractor("{friend} lives {d} miles away", 2, 300),
    Distractor("the train leaves from platform {d}", 1, 20),
    Distractor("{his} new bicycle cost {d} dollars", 50, 900),
    Distractor("{his} {rel} owns {d} hats", 2, 30),
    Distractor("the school tower is {d} feet high", 10, 250),
    Distractor("the school clock stopped {d} days ago", 2, 99),
    Distractor("{friend}'s cat is {d} years old", 2, 18),
    Distractor("the bus to school is number {d}", 1, 120),
)

LEADS: Final = ("Then ", "Then ", "Then ", "Later, ", "Later, ", "After that, ", "The next day, ")
