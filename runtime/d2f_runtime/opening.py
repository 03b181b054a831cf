"""From the name of a model to an engine over it: folder, backend, codec, defaults.

The one place that joins manifest, backend and tokenizer.
"""

import asyncio
import threading
from pathlib import Path
from typing import Final

import d2f_runtime.models
from d2f_runtime.backends import choose_backend, open_backend
from d2f_runtime.backends.scripted import ByteCodec
from d2f_runtime.engine import Limits, LocalEngine
from d2f_runtime.loaded_model import MODELS, ModelKey, ModelParts
from d2f_runtime.manifest import FILE_NAME, read_manifest, verify_files
from d2f_runtime.tokenizer import TextCodec, Tokenizer
from d2f_stream.errors import ModelNotFound, UnsupportedModel
from d2f_stream.params import GenerationParams

__all__ = ["embedded_folder", "open_engine", "shared_engine"]

MAX_HASH_BYTES: Final = 1 << 28  # larger files take longer to hash than to load

_shared: Final[dict[asyncio.AbstractEventLoop, dict[ModelKey, LocalEngine]]] = {}
_lock: Final = threading.Lock()


def open_engine(
    model: str | Path | None,
    *,
    backend: str = "auto",
    quantization: str = "auto",
    device: str = "auto",
    limits: Limits | None = None,
) -> LocalEngine:
    """Return a new engine; entering it waits for the model.

    Raises:
        ModelNotFound: there is no such folder.
        UnsupportedModel: the model or the backend is of a kind that this build does not know.
    """
    key = _key(model, backend=backend, quantization=quantization, device=device)
    return _engine(key, limits)


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


def _key(model: str | Path | None, *, backend: str, quantization: str, device: str) -> ModelKey:
    if isinstance(model, str) and "://" in model:
        raise UnsupportedModel(f"{model} is a remote model, which this build does not support yet")
    path = embedded_folder() if model is None else Path(model).expanduser().resolve()
    name = choose_backend(path, backend, device=device)
    return ModelKey(path=path, backend=name, device=device, quantization=quantization)


def _engine(key: ModelKey, limits: Limits | None = None) -> LocalEngine:
    return LocalEngine(MODELS.lease(key, key.path.name, lambda: _load(key)), limits=limits)


def _load(key: ModelKey) -> ModelParts:
    """Load everything. Runs on the model's device thread."""
    path = key.path
    manifest = read_manifest(path) if (path / FILE_NAME).exists() else None
    if manifest is not None:
        verify_files(path, manifest, max_hash_bytes=MAX_HASH_BYTES)
    backend = open_backend(key.backend, path, device=key.device, quantization=key.quantization)
    codec: TextCodec = ByteCodec() if key.backend == "scripted" else Tokenizer.from_folder(path)
    if manifest is not None:
        return ModelParts(
            backend, codec, manifest.params_for(backend.info.device), manifest.description
        )
    return ModelParts(backend, codec, GenerationParams(block_size=backend.info.native_block_size))
