"""The backends, by name. Each imports its heavy library only when it is chosen.

Knows where the backends live and which files and libraries each of them needs; nothing of engines.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, cast

from d2f_runtime.backends.base import Backend
from d2f_runtime.gguf.file import is_gguf
from d2f_runtime.models.pickles import refuse_pickles
from d2f_stream.core.errors import MissingExtra, ModelNotFound, UnsupportedModel

__all__ = [
    "BACKENDS",
    "BackendEntry",
    "check_backend",
    "choose_backend",
    "open_backend",
]


class Load(Protocol):
    """The `load` function of a backend's module."""

    def __call__(
        self,
        path: Path,
        *,
        device: str,
        quantization: str,
        adapter: Path | None = None,
        kv_tokens: int | None = None,
        family: str | None = None,
    ) -> Backend:
        """Load the model of a folder. Blocks. Only some backends take the last three."""
        ...


@dataclass(frozen=True, slots=True)
class BackendEntry:
    """Where a backend lives and what it needs.

    Attributes:
        module: has a `load` function.
        library: that the module imports; None where it needs none.
        extra: of this distribution that installs the library.
        suffix: of the files that the backend runs.
        merges: whether it can merge a LoRA adapter into the weights.
        sets_aside: whether it sets memory for K/V aside, so that one can say how much.
    """

    module: str
    library: str | None
    extra: str
    suffix: str
    merges: bool = False
    sets_aside: bool = False

    @property
    def installed(self) -> bool:
        """Whether the library can be found; does not import it."""
        return self.library is None or importlib.util.find_spec(self.library) is not None


BACKENDS: Final[Mapping[str, BackendEntry]] = {
    "onnx": BackendEntry("d2f_runtime.backends.onnx_backend", "onnxruntime", "edge", ".onnx"),
    "torch": BackendEntry(
        "d2f_runtime.backends.torch_backend",
        "torch",
        "torch",
        ".safetensors",
        merges=True,
        sets_aside=True,
    ),
    "scripted": BackendEntry("d2f_runtime.backends.scripted", None, "", "script.json"),
}


def check_backend(backend: str) -> None:
    """Refuse a name that is not one of a backend, nor "auto".

    Raises:
        UnsupportedModel: there is no backend of that name.
    """
    if backend not in {"auto", *BACKENDS}:
        known = ", ".join(["auto", *BACKENDS])
        raise UnsupportedModel(f"there is no backend {backend!r}; it must be one of {known}")


def choose_backend(path: Path, backend: str = "auto", *, device: str = "auto") -> str:
    """Return the name of the backend to run a model folder or a GGUF file with.

    "auto" takes the one whose files the folder holds; where several fit, one that is installed, and
    of those torch for a CUDA device and onnx otherwise. torch runs GGUF files.

    Raises:
        ModelNotFound: no such folder or file, or no backend runs what it holds.
        UnsupportedModel: there is no backend of that name, or it runs no such file, or the weights
            are pickled.
    """
    check_backend(backend)
    if not path.is_dir():
        return _check_file(path, backend)
    if backend != "auto":
        return backend
    names = {file.name for file in path.iterdir()}
    fitting = [
        name
        for name, entry in BACKENDS.items()
        if any(file.endswith(entry.suffix) for file in names)
    ]
    if not fitting:
        refuse_pickles(path)
        single = sorted(file for file in path.iterdir() if is_gguf(file))
        if single:
            raise ModelNotFound(
                f"{path} is a folder; pass the GGUF file itself, such as {single[0]}"
            )
        suffixes = ", ".join(f"*{entry.suffix}" for entry in BACKENDS.values())
        raise ModelNotFound(f"{path} holds nothing that a backend runs, which is one of {suffixes}")
    candidates = [name for name in fitting if BACKENDS[name].installed] or fitting
    if device.startswith("cuda") and "torch" in candidates:
        return "torch"
    return candidates[0]


def _check_file(path: Path, backend: str) -> str:
    """Return the backend of a model that is one file."""
    if not is_gguf(path) or not path.is_file():
        found = f"{path} is a file" if path.is_file() else f"no model at {path}"
        raise ModelNotFound(
            f"{found}; a model is a folder with a manifest.json or a config.json, a .gguf file, or "
            "the id of a hub repository (org/name)"
        )
    if backend not in ("auto", "torch"):
        raise UnsupportedModel(
            f"{path} is a GGUF file, which the torch backend runs; for the {backend} backend, "
            "write it as a folder with d2f-stream export"
        )
    return "torch"


def open_backend(
    name: str,
    path: Path,
    *,
    device: str,
    quantization: str,
    adapter: Path | None = None,
    kv_tokens: int | None = None,
    family: str | None = None,
) -> Backend:
    """Load a model folder or a GGUF file with the backend of that name. Blocks.

    Raises:
        MissingExtra: the backend's library is not installed.
        ModelError: the model cannot be loaded, or the backend takes no adapter or no kv_tokens.
    """
    entry = BACKENDS[name]
    if family is not None and not entry.merges:
        raise UnsupportedModel(
            f"the {name} backend goes by the folder's own manifest, so family ({family}) means "
            "nothing to it; leave it out"
        )
    if adapter is not None and not entry.merges:
        raise UnsupportedModel(
            f"the {name} backend cannot merge the adapter {adapter}; use the torch backend"
        )
    if kv_tokens is not None and not entry.sets_aside:
        raise UnsupportedModel(
            f"the {name} backend takes memory for K/V as requests come, so kv_tokens "
            f"({kv_tokens}) means nothing to it; leave it out or use the torch backend"
        )
    if entry.library is not None and not entry.installed:
        raise MissingExtra(f"backend {name!r}", entry.library, entry.extra)
    load = cast(Load, importlib.import_module(entry.module).load)
    given = {"adapter": adapter, "kv_tokens": kv_tokens, "family": family}
    options: Any = {key: value for key, value in given.items() if value is not None}
    return load(path, device=device, quantization=quantization, **options)
