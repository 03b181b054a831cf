"""Names: what people type for a model, and which one was probably meant by what is none."""

from d2f_runtime.models.catalogue import CATALOGUE, Entry
from d2f_runtime.models.installed import DEFAULT, EMBEDDED, installed_names
from d2f_stream.core.errors import ModelNotFound
from d2f_stream.core.nearest import did_you_mean

__all__ = ["find", "named", "suggest"]


def named(name: str) -> Entry | None:
    """Return the catalogue's entry of a short name; None for what is no short name.

    Raises:
        ModelNotFound: it looks like a short name ("word:size", or the beginning of one), and none
            is called so.
    """
    entry = next((entry for entry in CATALOGUE if entry.name == name.lower()), None)
    if entry is None and not {"/", "\\"} & set(name) and (":" in name or _near(name)):
        raise ModelNotFound(f"there is no model called {name!r:.100}; {suggest(name)}")
    return entry


def find(name: str) -> Entry | None:
    """Return the entry of a short name or of a repository; None where there is none.

    Raises:
        ModelNotFound: the name looks like a short one, and none is called so.
    """
    by_repo = (entry for entry in CATALOGUE if entry.repo.lower() == name.lower())
    return named(name) or next(by_repo, None)


def suggest(name: str) -> str:
    """Return the end of a sentence that proposes the names most like this one."""
    if name.rpartition(":")[2].isdecimal():  # a port
        return f"if it is a server, give its whole address: http://{name}"
    return _near(name) or "`d2f-stream models list` shows the names"


def _near(name: str) -> str:
    known = [*(entry.name for entry in CATALOGUE), *installed_names(), EMBEDDED]
    if name == DEFAULT and name not in known:
        return f"it is a package, which the checkout has: pip install ./models/{DEFAULT}"
    return "" if name in known else did_you_mean(name, known)
