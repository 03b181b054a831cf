"""Which known name was probably meant by one that is not known. Pure."""

import difflib
from collections.abc import Iterable
from typing import Final

__all__ = ["did_you_mean", "nearest", "one_of"]

MOST: Final = 4  # more is a list to read, which --help shows better


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Return the known names most like this one, best first; at most four, maybe none.

    Those that begin with it come before those that are spelt like it. Case and the dashes of
    options do not count.
    """
    plain = {_plain(other): other for other in known}
    wanted = _plain(name)
    begun = [other for text, other in plain.items() if wanted and text.startswith(wanted)]
    near = difflib.get_close_matches(wanted, plain, n=MOST)
    return begun[:MOST] or [plain[text] for text in near]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question that proposes the nearest names; empty where none is near."""
    near = nearest(name, known)
    if not near:
        return ""
    listed = " or ".join(filter(None, [", ".join(near[:-1]), near[-1]]))
    return f"did you mean {listed}?"


def one_of(name: str, known: Iterable[str]) -> str:
    """Return what a name must be that is not known: all names, and which was probably meant."""
    names = list(known)
    return "; ".join(filter(None, [f"one of {', '.join(names)}", did_you_mean(name, names)]))


def _plain(name: str) -> str:
    return name.lower().lstrip("-")
