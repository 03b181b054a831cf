"""Fetching what a model of the hub lacks here: as it loads, or ahead of that where Ctrl-C is heard.

A model loads on its device's thread, which no signal interrupts; a program's first thread can be.
"""

from pathlib import Path

from d2f_runtime.models.hub import (
    HubModel,
    fetch_description,
    fetch_one_by_one,
    fetch_weights,
    is_cached,
)
from d2f_runtime.models.published import find_published

__all__ = ["fetch_ahead", "fetched"]


def fetch_ahead(source: Path | HubModel | None, *, family: str | None = None) -> None:
    """Fetch a model or an adapter in this thread, file by file, if it is not here. Blocks.

    What is left after that, `fetched` gets. Ctrl-C ends it at once; whole files are kept.

    Raises:
        ModelError: see `fetched`.
    """
    if isinstance(source, HubModel) and not is_cached(source):
        folder = _description(source, family)
        fetch_one_by_one(source, folder)


def fetched(source: Path | HubModel, *, family: str | None = None) -> Path:
    """Return the folder of a model or an adapter; refuses an unknown family before its weights.

    Blocks.

    Raises:
        ModelNotFound: see `fetch_description` and `fetch_weights`.
        ModelError: its files are not those of a model that this build runs.
    """
    if isinstance(source, Path):
        return source
    folder = _description(source, family)
    fetch_weights(source, folder)
    return folder


def _description(source: HubModel, family: str | None) -> Path:
    folder = fetch_description(source)
    find_published(folder, family=family)
    return folder
