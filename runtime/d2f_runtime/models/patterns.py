"""Regular expressions that come with a file, matched against module names in bounded time.

Python's matcher backtracks and cannot be stopped, so an expression that may take for ever runs in a
process of its own, which can. Names without anything special, which is what nearly all adapters
have, need none.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

from d2f_stream.core.errors import ModelDamaged, UnsupportedModel

__all__ = ["first_matches"]

TIMEOUT_S: Final = 5.0  # a process starts in a tenth of a second
MAX_CHARACTERS: Final = 1 << 20

_PLAIN: Final = re.compile(r"[\w.]*(?:\\\.[\w.]*)*")  # a name, whose dots may be escaped
_MATCH: Final = """
import json, re, sys
patterns, names = json.load(sys.stdin)
compiled = [re.compile(pattern) for pattern in patterns]
first = lambda name: next((i for i, p in enumerate(compiled) if p.match(name)), None)
json.dump([first(name) for name in names], sys.stdout)
"""


def first_matches(
    patterns: Sequence[str], names: Sequence[str], form: str, where: str
) -> list[int | None]:
    """Return for each name the index of the first pattern that it matches; None without one.

    Args:
        patterns: regular expressions.
        names: of modules.
        form: what `re.match` is given, "{}" being the pattern.
        where: file and key, for errors.

    Raises:
        ModelDamaged: one is no regular expression.
        UnsupportedModel: they take longer than any that is meant to be matched.
    """
    if not patterns or not names:
        return [None] * len(names)
    if sum(map(len, patterns)) > MAX_CHARACTERS:
        raise UnsupportedModel(f"{where} has expressions of more than {MAX_CHARACTERS} characters")
    whole = [form.replace("{}", pattern) for pattern in patterns]
    if all(_PLAIN.fullmatch(pattern) for pattern in patterns):
        compiled = [re.compile(pattern) for pattern in whole]
        return [next((i for i, p in enumerate(compiled) if p.match(n)), None) for n in names]
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH],
            input=json.dumps([whole, list(names)]),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UnsupportedModel(
            f"{where} has a regular expression that takes more than {TIMEOUT_S:g} s to match: "
            f"{max(patterns, key=len)[:100]!r}; write it without nested repetitions"
        ) from error
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise ModelDamaged(f"{where} is no regular expression: {reason}")
    found: list[int | None] = json.loads(done.stdout)
    return found
