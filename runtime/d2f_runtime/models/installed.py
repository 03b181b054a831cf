"""Models that are packages of their own, found by their entry points, and the one of this package.

A package names itself in the group "d2f_stream.models" and points at the path of its model folder,
which it holds. What it is called there is what users type. Knows no backend.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final

import d2f_runtime.models
from d2f_runtime.models.manifest import FILE_NAME
from d2f_runtime.text.files import holds_file
from d2f_stream.core.errors import ModelNotFound

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints

__all__ = [
    "DEFAULT",
    "EMBEDDED",
    "GROUP",
    "default_folder",
    "embedded_folder",
    "find_installed",
    "installed_names",
]

logger = logging.getLogger("d2f_stream.opening")

GROUP: Final = "d2f_stream.models"
DEFAULT: Final = "smollm2-135m-d2f"
"""The model that is meant where none is named, if its package is installed."""
EMBEDDED: Final = "word-problems"
"""The name of the model in this package, where another one is the default."""


def installed_names() -> list[str]:
    """Return the names of the installed packages' models, sorted."""
    return sorted({entry.name for entry in _entries()})


def find_installed(name: str) -> Path | None:
    """Return the folder of an installed model; None where no package has one of that name.

    Raises:
        ModelNotFound: its package is broken, or holds no model.
    """
    entries = _entries().select(name=name)
    if not entries:
        return None
    entry = next(iter(entries))
    try:
        folder = entry.load()
    except (ImportError, AttributeError) as error:
        raise ModelNotFound(
            f"the package of model {name} cannot be loaded ({error}); install it again"
        ) from error
    if not isinstance(folder, Path) or not holds_file(folder / FILE_NAME):
        raise ModelNotFound(
            f"the package of model {name} is installed, but {folder} holds no {FILE_NAME}; build "
            "the model as the package's README says, and install it again"
        )
    return folder


def default_folder() -> Path:
    """Return the folder of the model that is meant where none is named.

    That is the installed package's, where there is one, else the embedded one.

    Raises:
        ModelNotFound: this installation has neither.
    """
    try:
        folder = find_installed(DEFAULT)
    except ModelNotFound as error:
        logger.warning("%s; until then %s answers, which solves word problems", error, EMBEDDED)
        folder = None
    return embedded_folder() if folder is None else folder


def embedded_folder() -> Path:
    """Return the folder of the model that ships with the package.

    Raises:
        ModelNotFound: this installation has none.
    """
    folder = Path(d2f_runtime.models.__path__[0]) / "embedded"
    if not (folder / FILE_NAME).is_file():
        raise ModelNotFound(
            f"the embedded model is not part of this installation ({folder} lacks {FILE_NAME}); "
            "pass a model folder as model="
        )
    return folder


def _entries() -> "EntryPoints":
    from importlib.metadata import entry_points  # a fifth of what every command imports

    return entry_points(group=GROUP)
