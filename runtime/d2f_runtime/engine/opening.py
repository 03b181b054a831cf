"""From the name of a model to an engine over it: folder, backend, codec, defaults.

The one place that joins folder, GGUF file or hub id, manifest or published config, backend and
tokenizer.
"""

import asyncio
import os
import threading
from pathlib import Path
from typing import Final

from d2f_runtime.backends import BACKENDS, check_backend, choose_backend, open_backend
from d2f_runtime.backends.devices import check_device
from d2f_runtime.backends.scripted import ByteCodec
from d2f_runtime.engine.answer_params import default_params
from d2f_runtime.engine.fetching import fetch_ahead, fetched
from d2f_runtime.engine.local import Limits, LocalEngine
from d2f_runtime.gguf.file import GgufFile, is_gguf
from d2f_runtime.loaded_model import MODELS, ModelKey, ModelParts
from d2f_runtime.models.catalogue import CATALOGUE
from d2f_runtime.models.config_file import ConfigFile
from d2f_runtime.models.draft_facts import DraftFacts
from d2f_runtime.models.facts import WITHOUT_THOUGHTS, About
from d2f_runtime.models.files_digest import digest_of_files
from d2f_runtime.models.hub import HubModel, locate
from d2f_runtime.models.installed import (
    EMBEDDED,
    default_folder,
    embedded_folder,
    find_installed,
)
from d2f_runtime.models.manifest import FILE_NAME, Manifest, read_manifest, verify_files
from d2f_runtime.models.names import named
from d2f_runtime.models.published import Published, find_published
from d2f_runtime.text.files import holds_file
from d2f_runtime.text.tokenizer import TextCodec, Tokenizer
from d2f_stream.core.errors import InvalidParams, UnsupportedModel

__all__ = ["fetch_model", "open_engine", "shared_engine"]

MAX_HASH_BYTES: Final = 1 << 28  # larger files take longer to hash than to load

_shared: Final[dict[asyncio.AbstractEventLoop, dict[ModelKey, LocalEngine]]] = {}
_lock: Final = threading.Lock()


def _begin_anew() -> None:
    _shared.clear()  # their threads are the parent's
    _lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_begin_anew
    )


def open_engine(
    model: str | Path | None,
    *,
    adapter: str | Path | None = None,
    backend: str = "auto",
    quantization: str = "auto",
    device: str = "auto",
    kv_tokens: int | None = None,
    family: str | None = None,
    warm_up: bool = False,
    limits: Limits | None = None,
) -> LocalEngine:
    """Return a new engine; entering it waits for the model.

    Args:
        model: a folder, a GGUF file or a hub id; None is the default one.
        adapter: folder or hub id of a LoRA adapter to merge into the weights, or of a draft
            adapter, which drafts go through beside them.
        backend: see `d2f_stream.load`, as for the next two.
        quantization: what the backend offers.
        device: "auto", "cpu", "cuda", ...
        kv_tokens: that all sessions together may hold; None goes by the device's memory.
        family: which it is, where a published model's files do not tell.
        warm_up: prepare the model's steps on entering, too.
        limits: how much the engine takes on at once.

    Raises:
        ModelNotFound: there is no such folder. Whether there is such a repository shows on
            entering.
        UnsupportedModel: the model or the backend is of a kind that this build does not know.
        InvalidParams: kv_tokens is no positive number.
    """
    if kv_tokens is not None and (not isinstance(kv_tokens, int) or kv_tokens < 1):
        raise InvalidParams("kv_tokens", kv_tokens, "an integer of at least 1")
    key = _key(
        model,
        backend=backend,
        quantization=quantization,
        device=device,
        adapter=adapter,
        kv_tokens=kv_tokens,
        family=family,
    )
    return _engine(key, limits, warm_up=warm_up)


def fetch_model(
    model: str | Path | None,
    *,
    adapter: str | Path | None = None,
    backend: str = "auto",
    device: str = "auto",
    family: str | None = None,
) -> None:
    """Fetch what is not here of a model that `open_engine` is to open. Blocks.

    For programs, before they open it: in the first thread Ctrl-C ends it at once.

    Raises:
        ModelError: as `open_engine` does, and its engine on entering.
    """
    if model is None and adapter is None:
        return  # the default one is installed
    key = _key(
        model, backend=backend, quantization="auto", device=device, adapter=adapter, family=family
    )
    check_device(key.device, backend=key.backend)  # before anything is fetched
    fetch_ahead(key.path, family=key.family)
    fetch_ahead(key.adapter)


def shared_engine(model: str | Path | None) -> LocalEngine:
    """Return the running event loop's engine for the model; it lives as long as the loop.

    Its lease is never given back, so the weights stay loaded for later loops of the process. An
    engine that failed is replaced.

    Raises:
        ModelNotFound: there is no such folder.
        UnsupportedModel: the model is of a kind that this build does not know.
    """
    key = _key(model, backend="auto", quantization="auto", device="auto")
    loop = asyncio.get_running_loop()
    with _lock:
        for old in [old for old in _shared if old.is_closed()]:
            del _shared[old]
        engines = _shared.setdefault(loop, {})
        engine = engines.get(key)
        if engine is not None and not engine.usable:
            engine.shut()
            engine = None
        if engine is None:
            engine = engines[key] = _engine(key)
        return engine


def _key(
    model: str | Path | None,
    *,
    backend: str,
    quantization: str,
    device: str,
    adapter: str | Path | None = None,
    kv_tokens: int | None = None,
    family: str | None = None,
) -> ModelKey:
    if isinstance(model, str) and "://" in model:
        raise UnsupportedModel(
            f"{model} is a server; what runs here is a folder, a .gguf file or a hub id"
        )
    path = _located(model)
    if adapter is None and isinstance(path, HubModel) and isinstance(model, str):
        entry = named(model)  # a name stands for a model with the adapter it is meant to have
        adapter = None if entry is None else entry.adapter
    if isinstance(path, HubModel):
        check_backend(backend)
        name = backend  # "auto" is decided by the files, once they are here
    else:
        name = choose_backend(path, backend, device=device)
    return ModelKey(
        path=path,
        backend=name,
        device=device,
        quantization=quantization,
        adapter=None if adapter is None else locate(adapter),
        kv_tokens=kv_tokens,
        family=family,
    )


def _located(model: str | Path | None) -> Path | HubModel:
    """Return where a model is. A folder of the name goes before what is installed."""
    if model is None:
        return default_folder()
    if isinstance(model, str) and not Path(model).exists():
        if model == EMBEDDED:
            return embedded_folder()
        if "/" not in model and (folder := find_installed(model)) is not None:
            return folder
    return locate(model)


def _engine(key: ModelKey, limits: Limits | None = None, *, warm_up: bool = False) -> LocalEngine:
    model = MODELS.lease(key, key.path.name, lambda: _load(key))
    return LocalEngine(model, limits=limits, warm_up=warm_up)


def _load(key: ModelKey) -> ModelParts:
    """Load everything. Runs on the model's device thread."""
    check_device(key.device, backend=key.backend)  # before anything is fetched
    path = fetched(key.path, family=key.family)
    adapter = None if key.adapter is None else fetched(key.adapter)
    draft = None if adapter is None else DraftFacts.read(adapter)
    name = choose_backend(path, key.backend, device=key.device)
    manifest = read_manifest(path) if holds_file(path / FILE_NAME) else None
    published = find_published(path, family=key.family) if manifest is None else None
    if manifest is not None:
        verify_files(path, manifest, max_hash_bytes=MAX_HASH_BYTES)
    defaults = None if published is None else published.defaults(adapted=adapter is not None)
    codec: TextCodec = ByteCodec()
    if name != "scripted":
        codec = Tokenizer.from_folder(
            path,
            mask_id=_mask_id(path, manifest, published, draft),
            opens_thoughts=_family(path, manifest, published) not in WITHOUT_THOUGHTS,
        )
    backend = open_backend(  # last, so that memory is taken for nothing that is wrong
        name,
        path,
        device=key.device,
        quantization=key.quantization,
        adapter=adapter,
        kv_tokens=key.kv_tokens,
        family=key.family,
    )
    if manifest is not None:
        defaults = manifest.params_for(backend.info.device)
    elif defaults is None:
        defaults = default_params(backend.info)
    if draft is not None:
        defaults = draft.defaults(defaults)
    hub_name = key.path.name if isinstance(key.path, HubModel) else None
    about = _about(key.path, path) if manifest is None else manifest.people
    folders = (path,) if adapter is None else (path, adapter)
    files = digest_of_files(*folders, weights=BACKENDS[name].suffix)
    return ModelParts(backend, codec, defaults, about, name=hub_name, files=files)


def _about(source: Path | HubModel, path: Path) -> About:
    """Return what is known of a model without a manifest: its licence, where it has a name."""
    if is_gguf(path):
        named = GgufFile.open(path).metadata.get("general.license")
        return About(license=named if isinstance(named, str) else "")
    repo = source.repo if isinstance(source, HubModel) else None
    licences = (entry.licence for entry in CATALOGUE if entry.repo == repo)
    return About(license=next(licences, ""))


def _family(path: Path, manifest: Manifest | None, published: Published | None) -> object:
    """Return the label of the family, where a file tells it."""
    if manifest is not None:
        return manifest.family
    if published is not None:
        return published.config.family
    config = ConfigFile.read(path / "config.json")
    return None if config is None else config.values.get("family")


def _mask_id(
    path: Path, manifest: Manifest | None, published: Published | None, draft: DraftFacts | None
) -> int | None:
    """Return the mask's id; None where the backend, which comes later, has to say what is wrong."""
    if draft is not None and draft.mask_id is not None:
        return draft.mask_id
    if manifest is not None:
        return manifest.mask_id
    if published is not None:
        return published.config.mask_id
    config = ConfigFile.read(path / "config.json")
    mask_id = None if config is None else config.values.get("mask_id")
    return mask_id if isinstance(mask_id, int) else None
