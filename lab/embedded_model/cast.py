"""The people and things that word problems are about.

Owns names with their pronouns, relatives and countable objects. Knows no sentence and no number.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final


class Kind(Enum):
    """What an object is, which decides the sentences it may appear in."""

    FOOD = "food"
    THING = "thing"


@dataclass(frozen=True, slots=True)
class Person:
    """A name and its pronouns; the slots are called after the masculine forms."""

    name: str
    he: str
    him: str
    his: str


@dataclass(frozen=True, slots=True)
class Item:
    """A countable object in both numbers."""

    singular: str
    plural: str
    kind: Kind


_SHE: Final = (
    "Mia Anna Zoe Eva Lena Clara Nora Ruby Ivy Emma Lucy Maya Rosa Hana Leila Mei Priya Amara "
    "Sofia Nadia Julia Elena Alice Freya"
)
_HE: Final = (
    "Ben Tom Leo Omar Raj Noah Hugo Ivan Kofi Liam Diego Felix Max Sam Marco Kenji Adam Theo "
    "Jamal Oscar Pablo Emil David Finn"
)

# NOTE: no name ends in s, so that the possessive is always 's.
PEOPLE: Final = (
    *(Person(name, "she", "her", "her") for name in _SHE.split()),
    *(Person(name, "he", "him", "his") for name in _HE.split()),
)

RELATIONS: Final = (
    "uncle",
    "aunt",
    "cousin",
    "neighbor",
    "teacher",
    "grandmother",
    "grandfather",
    "best friend",
    "sister",
    "brother",
)

_FOOD: Final = (
    "apple orange pear plum lemon cookie muffin carrot bagel waffle cupcake melon banana onion "
    "pancake pretzel walnut peach:peaches cherry:cherries tomato:tomatoes"
)
_THINGS: Final = (
    "sticker marble pencil book button bead shell stamp coin card balloon badge puzzle feather "
    "ticket comic candle token photo pebble poster toy mug ribbon crayon magnet flower "
    "postcard brush:brushes"
)


def _items(words: str, kind: Kind) -> tuple[Item, ...]:
    pairs = (word.partition(":") for word in words.split())
    return tuple(Item(single, plural or single + "s", kind) for single, _, plural in pairs)


ITEMS: Final = (*_items(_FOOD, Kind.FOOD), *_items(_THINGS, Kind.THING))
