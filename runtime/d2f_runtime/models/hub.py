"""Models by the id of a Hugging Face repository: which ids, which files of it, and where they lie.

The only file that knows huggingface_hub, which it imports when a hub id is fetched. Fetches what a
model needs and nothing else: first the small files, so that a model that cannot run is refused
before its weights are on their way. Never code, never pickles.
"""

import contextlib
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from d2f_runtime.gguf.file import is_gguf
from d2f_runtime.models.config_file import ConfigFile
from d2f_runtime.models.names import named
from d2f_stream.core.errors import D2FError, MissingExtra, ModelNotFound

__all__ = [
    "HubModel",
    "NotFetched",
    "fetch_description",
    "fetch_one_by_one",
    "fetch_weights",
    "locate",
]

DESCRIPTION: Final = ("*.json", "*.jinja", "merges.txt")
WEIGHTS: Final = ("model.safetensors", "adapter_model.safetensors", "model*.onnx*")
INDEX: Final = "model.safetensors.index.json"

_ID: Final = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?"
)


@dataclass(frozen=True, slots=True)
class HubModel:
    """A repository, "org/name", and its branch, tag or commit; None is the main branch."""

    repo: str
    revision: str | None = None

    @property
    def name(self) -> str:
        """Return the model's name for people."""
        return self.repo

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


class NotFetched(ModelNotFound):
    """The hub does not give what it may have: it is out of reach, or wants a login."""


class _Unreachable(NotFetched):
    """What is not in the cache does not come."""

    def __init__(self, model: HubModel, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"there is no folder {model}, and the repository of that id is not in the local cache "
            f"and cannot be fetched: {reason}"
        )


def locate(model: str | Path) -> Path | HubModel:
    """Return the path that exists, else the repository of that name, else the missing path.

    A path wins over a name or a hub id of the same text; a Path is never either, nor is x/y.gguf.

    Raises:
        ModelNotFound: it looks like a name of the catalogue ("word:size", or the beginning of
            one), and is none; or no file system has such names.
    """
    try:
        path = Path(model).expanduser()
        whole, exists = path.resolve(), path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelNotFound(f"there is no model {str(model)!r:.100}: {error!s:.100}") from error
    if is_gguf(path):
        return path.absolute()  # the hub's cache links it to a name that says no format
    if isinstance(model, str) and not exists and (entry := named(model)) is not None:
        return HubModel(entry.repo)
    match = _ID.fullmatch(model) if isinstance(model, str) else None
    if match is None or exists:
        return whole
    return HubModel(match["repo"], match["revision"])


def fetch_description(model: HubModel) -> Path:
    """Return the folder with a repository's small files; fetches those that it lacks. Blocks.

    Raises:
        ModelNotFound: there is no such repository or revision, or it is neither cached nor within
            reach.
        MissingExtra: huggingface_hub is not installed.
    """
    return _snapshot(model, model.revision, DESCRIPTION)


def fetch_weights(model: HubModel, folder: Path) -> None:
    """Fetch the weights that belong to a folder of `fetch_description`. Blocks.

    Raises:
        ModelNotFound: they are neither cached nor within reach.
        ModelDamaged: the index of the shards cannot be read.
    """
    try:
        _snapshot(model, folder.name, _weights(folder))  # the commit: its branch may have moved on
    except _Unreachable as error:
        raise _incomplete(model, error.reason) from error


def is_cached(model: HubModel) -> bool:
    """Whether the cache holds a repository's weights, as far as its index tells their names.

    Raises:
        ModelDamaged: the index of the shards cannot be read.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        return False
    try:
        folder = Path(snapshot_download(model.repo, revision=model.revision, local_files_only=True))
    except FileNotFoundError:  # the library's error is one of these
        return False
    names = _weights(folder)
    found = [any(folder.glob(name)) for name in names]
    return any(found) if names is WEIGHTS else all(found)


def fetch_one_by_one(model: HubModel, folder: Path) -> None:
    """Fetch those weights whose names are certain, in this thread, with a bar for each file.

    So Ctrl-C ends it at once, where `fetch_weights`, which fetches the others too, would end the
    files on their way first. Blocks.

    Raises:
        ModelNotFound: one of them does not come.
        ModelDamaged: the index of the shards cannot be read.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for name in _weights(folder):
        if "*" not in name:
            try:
                # A model has one kind of weights; what is missing shows later.
                with _told(model), contextlib.suppress(EntryNotFoundError):
                    hf_hub_download(model.repo, name, revision=folder.name)
            except _Unreachable as error:
                raise _incomplete(model, error.reason) from error


def _weights(folder: Path) -> Sequence[str]:
    """Return the files of a model's weights; patterns, where no index names them."""
    index = ConfigFile.read(folder / INDEX)
    if index is None:
        return WEIGHTS
    return sorted({str(file) for file in index.section("weight_map").values.values()})


def _incomplete(model: HubModel, reason: str) -> NotFetched:
    return NotFetched(
        f"the weights of {model} have not all come; files that have are kept, so fetch it again: "
        f"{reason}"
    )


def _snapshot(model: HubModel, revision: str | None, patterns: Sequence[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtra(f"fetching {model}", "huggingface_hub", "torch") from error
    with _told(model):
        return Path(
            snapshot_download(
                model.repo,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=["*/*"],
            )
        )


@contextlib.contextmanager
def _told(model: HubModel) -> Iterator[None]:
    """Raise what the hub's library raises as an error that says what it means here."""
    try:
        yield
    except Exception as error:  # those of its HTTP library too, which differs by version
        raise _not_found(model, error) from error


def _not_found(model: HubModel, error: Exception) -> D2FError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return NotFetched(
            f"the repository {model} is gated: accept its terms on huggingface.co, then log in "
            "with `hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelNotFound(
            f"there is neither a folder nor a public repository {model}; for a private one, log in "
            "with `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFound(f"the repository {model.repo} has no revision {model.revision!r}")
    response = getattr(error, "response", None)
    if response is not None and response.status_code in (401, 403):
        return NotFetched(
            f"the hub does not let you read {model} (status {response.status_code}); log in with "
            "`hf auth login`, as somebody who may"
        )
    return _Unreachable(model, _reason(error))


def _reason(error: Exception) -> str:
    """Return why the hub's library got nothing, without its advice where the cause is plain."""
    from huggingface_hub import constants, errors

    root: BaseException = error
    while (below := root.__cause__ or root.__context__) is not None:
        root = below
    if isinstance(root, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, which forbids it"
    if isinstance(root, socket.gaierror | ConnectionError | TimeoutError):
        return f"{constants.ENDPOINT} cannot be reached ({root.strerror or type(root).__name__})"
    return " ".join(str(error).split()) or type(error).__name__
