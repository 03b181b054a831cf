"""The English of the operations in a word problem, with slots for people, things and numbers.

Owns wording only; plans.py draws the numbers and problems.py fills the slots:

    {name} {he} {him} {his} {He} {His}   the main person
    {friend} {rel}                       another name; a relation such as "uncle"
    {obj} {objs}                         the object, singular and plural
    {them}                               "them" or "the rest" where clear, else "her apples"
    {b} {times}                          the operand; "twice" or "3 times"
    {eq} {o}                             "12 + 30 = 42"; the object in the number of the result

A question sentence has no full stop. One that begins with a capital letter takes no lead-in and is
never joined to the one before. Verbs never agree with {eq}, which may end in 1.
"""

from dataclasses import dataclass
from typing import Final

from lab.embedded_model.cast import Kind


@dataclass(frozen=True, slots=True)
class Phrasing:
    """One way to tell an operation and to explain it, for operands low..high."""

    question: str
    answer: str
    low: int = 2
    high: int = 999
    only: Kind | None = None


_FOOD: Final = Kind.FOOD
_THING: Final = Kind.THING

ADDITIONS: Final = (
    Phrasing("{he} buys {b} more {objs}", "{He} buys {b} more, so now {he} has {eq} {o}."),
    Phrasing(
        "{his} {rel} gives {him} {b} {objs}", "{His} {rel} gives {him} {b}, so {he} has {eq} {o}."
    ),
    Phrasing(
        "{he} finds {b} {objs} in the kitchen",
        "{He} finds {b} more, which makes {eq} {o}.",
        high=80,
    ),
    Phrasing("a parcel with {b} {objs} arrives", "The parcel adds {b}, so now {he} has {eq} {o}."),
    Phrasing(
        "{friend} brings {him} another {b} {objs}",
        "{friend} brings another {b}, and that makes {eq} {o}.",
    ),
    Phrasing(
        "{he} gets {b} {objs} from {his} {rel}",
        "{He} gets {b} from {his} {rel}, which makes {eq} {o}.",
    ),
    Phrasing("{he} orders {b} extra {objs}", "The order adds {b}, so now {he} has {eq} {o}."),
    Phrasing(
        "{he} earns {b} {objs} by helping {his} {rel}", "{He} earns {b} more, so {he} has {eq} {o}."
    ),
    Phrasing(
        "{he} wins {b} {objs} at the fair", "{He} wins {b}, and now {he} has {eq} {o}.", high=400
    ),
    Phrasing(
        "{friend} has too many {objs} and gives {him} {b}",
        "{friend} gives {him} {b}, so {he} has {eq} {o}.",
    ),
    Phrasing("{he} trades an old coat for {b} {objs}", "The trade adds {b}, which makes {eq} {o}."),
    Phrasing(
        "{his} {rel} brings {b} more {objs}",
        "{His} {rel} adds {b}, so now {he} has {eq} {o}.",
    ),
    Phrasing(
        "During a sale, {he} buys another {b} {objs}",
        "In the sale {he} buys {b}, so {he} has {eq} {o}.",
    ),
    Phrasing(
        "{he} collects {b} {objs} from the neighbors",
        "{He} collects {b} more, so {he} has {eq} {o}.",
    ),
    Phrasing(
        "{he} picks up {b} more {objs} in town",
        "{He} picks up {b} more, so {he} has {eq} {o}.",
    ),
    Phrasing(
        "{he} takes {b} more {objs} from the fridge",
        "The fridge adds {b}, which makes {eq} {o}.",
        high=60,
        only=_FOOD,
    ),
    Phrasing(
        "{he} finds {b} {objs} in an old box",
        "The old box adds {b}, which makes {eq} {o}.",
        high=300,
        only=_THING,
    ),
)

SUBTRACTIONS: Final = (
    Phrasing(
        "{he} gives {b} {objs} to {friend}", "{He} gives {b} to {friend}, which leaves {eq} {o}."
    ),
    Phrasing("{he} sells {b} of {them}", "{He} sells {b}, so now {he} has {eq} {o}."),
    Phrasing(
        "{he} loses {b} {objs} on the way home",
        "{He} loses {b}, so {he} has {eq} {o} left.",
        high=250,
    ),
    Phrasing(
        "{his} {rel} borrows {b} {objs}",
        "{His} {rel} borrows {b}, so {he} has {eq} {o} left.",
        only=_THING,
    ),
    Phrasing("{he} donates {b} {objs} to a school", "{He} donates {b}, which leaves {eq} {o}."),
    Phrasing("{he} hands out {b} {objs} in class", "{He} hands out {b}, and that leaves {eq} {o}."),
    Phrasing(
        "{his} {rel} asks for {b} {objs} and gets them",
        "{His} {rel} gets {b}, which leaves {eq} {o}.",
    ),
    Phrasing("{friend} takes {b} of {them} home", "{friend} takes {b}, and that leaves {eq} {o}."),
    Phrasing(
        "{he} throws away {b} damaged {objs}",
        "{He} throws away {b}, so {he} has {eq} {o} left.",
        only=_THING,
    ),
    Phrasing(
        "{he} throws away {b} spoiled {objs}",
        "{He} throws away {b}, so {he} has {eq} {o} left.",
        only=_FOOD,
    ),
    Phrasing(
        "{he} sends {b} {objs} to {his} {rel}", "{He} sends away {b}, so now {he} has {eq} {o}."
    ),
    Phrasing(
        "{he} trades {b} of {them} for a new hat",
        "{He} trades away {b}, so {he} has {eq} {o} left.",
    ),
    Phrasing(
        "{he} leaves {b} of {them} at {friend}'s house",
        "{He} leaves {b} there, so now {he} has {eq} {o}.",
        high=400,
    ),
    Phrasing("A customer buys {b} of {them}", "The customer buys {b}, which leaves {eq} {o}."),
    Phrasing(
        "{he} eats {b} of {them} with friends",
        "They eat {b}, so {he} has {eq} {o} left.",
        high=40,
        only=_FOOD,
    ),
)

MULTIPLICATIONS: Final = (
    Phrasing("Soon {he} has {times} as many {objs}", "Having {times} as many makes {eq} {o}."),
    Phrasing(
        "the number of {objs} doubles", "The number doubles, so now {he} has {eq} {o}.", high=2
    ),
    Phrasing(
        "{his} supply of {objs} triples",
        "The supply triples, so now {he} has {eq} {o}.",
        low=3,
        high=3,
    ),
    Phrasing(
        "{he} swaps every {obj} for {b} smaller ones",
        "{He} gets {b} for each one, which makes {eq} {o}.",
    ),
    Phrasing(
        "a friendly wizard turns each {obj} into {b}",
        "The wizard makes {b} of each one, so {he} has {eq} {o}.",
    ),
    Phrasing(
        "{he} buys enough to have {times} as many",
        "{He} has {times} as many, which makes {eq} {o}.",
    ),
    Phrasing(
        "{he} trades {them} for a pile {times} as big",
        "The pile is {times} as big, so now {he} has {eq} {o}.",
    ),
    Phrasing(
        "For every {obj}, {his} {rel} adds one more",
        "One more for every {obj} makes {eq} {o}.",
        high=2,
    ),
    Phrasing(
        "For every {obj}, {his} {rel} adds two more",
        "Two more for every {obj} makes {eq} {o}.",
        low=3,
        high=3,
    ),
    Phrasing(
        "a delivery makes {his} supply {times} as big",
        "The supply is {times} as big, so {he} has {eq} {o}.",
    ),
    Phrasing(
        "{he} keeps collecting until {he} has {times} as many",
        "Collecting {times} as many makes {eq} {o}.",
        only=_THING,
    ),
    Phrasing("A month later, {he} has {times} that number", "After the month {he} has {eq} {o}."),
    Phrasing(
        "A lucky day leaves {him} with {times} as many",
        "The lucky day makes {times} as many, or {eq} {o}.",
    ),
)

DIVISIONS: Final = (
    Phrasing(
        "{he} splits {them} into {b} equal piles and keeps one",
        "Each of the {b} piles has {eq} {o}, and {he} keeps one.",
    ),
    Phrasing(
        "{he} packs {them} in {b} equal boxes and keeps one",
        "Each of the {b} boxes holds {eq} {o}.",
    ),
    Phrasing("{he} gives away half of {them}", "Half are gone, so now {he} has {eq} {o}.", high=2),
    Phrasing(
        "{he} keeps only a third of {them}",
        "{He} keeps a third, so now {he} has {eq} {o}.",
        low=3,
        high=3,
    ),
    Phrasing(
        "{he} keeps only a quarter of {them}",
        "{He} keeps a quarter, so now {he} has {eq} {o}.",
        low=4,
        high=4,
    ),
    Phrasing(
        "{he} keeps only a fifth of {them}",
        "{He} keeps a fifth, so now {he} has {eq} {o}.",
        low=5,
        high=5,
    ),
    Phrasing(
        "{he} shares {them} equally in a group of {b}",
        "In a group of {b}, each one gets {eq} {o}.",
        low=3,
    ),
    Phrasing(
        "{he} puts {them} on {b} equal trays and sells all but one",
        "The last of the {b} trays holds {eq} {o}.",
        low=3,
    ),
    Phrasing("{he} keeps one out of every {b} {objs}", "One out of every {b} makes {eq} {o}."),
    Phrasing(
        "{he} sorts {them} into {b} equal bags and keeps one",
        "The last of the {b} bags holds {eq} {o}.",
        low=3,
    ),
    Phrasing(
        "{he} lays {them} in {b} equal rows, and {friend} takes all but one",
        "The last of the {b} rows has {eq} {o}.",
        low=3,
    ),
    Phrasing(
        "{he} puts {them} in {b} equal baskets but keeps only one",
        "Each of the {b} baskets holds {eq} {o}.",
    ),
    Phrasing(
        "{he} keeps just one of {b} equal shares",
        "With {b} equal shares, {he} keeps {eq} {o}.",
    ),
)
