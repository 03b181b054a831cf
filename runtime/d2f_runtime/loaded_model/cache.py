"""ModelCache: the loaded models of the process, leased to engines; closed at exit.

The only state of the package that outlives an event loop.
"""

import asyncio
import atexit
import ctypes
import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Final

from d2f_runtime.loaded_model.model import LoadedModel
from d2f_runtime.loaded_model.parts import ModelKey, ModelParts

__all__ = ["MODELS", "ModelCache"]

logger = logging.getLogger("d2f_stream.engine")

EXIT_TIMEOUT_S: Final = 30.0


class ModelCache:
    """The loaded models of the process, by key, each with the number of engines that lease it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: dict[ModelKey, LoadedModel] = {}
        self._leases: dict[LoadedModel, int] = {}

    def lease(self, key: ModelKey | None, name: str, load: Callable[[], ModelParts]) -> LoadedModel:
        """Return the model of the key, new where there is none; with key None, one for itself."""
        with self._lock:
            model = self._models.get(key) if key is not None else None
            if model is None:
                model = LoadedModel(name, load, key=key, keeps_prefixes=key is not None)
                self._leases[model] = 0
                if key is not None:
                    self._models[key] = model
            self._leases[model] += 1
            return model

    def renew(self, model: LoadedModel) -> LoadedModel:
        """Return a lease of the same model, to be loaded anew: it failed, and was given back."""
        return self.lease(model.key, model.name, model._load)

    def release(self, model: LoadedModel) -> "asyncio.Future[None] | None":
        """Give a lease back; the last one closes the model, which the future tells the end of."""
        with self._lock:
            if model not in self._leases:  # leased before this process was forked
                return None
            self._leases[model] -= 1
            if self._leases[model]:
                return None
            del self._leases[model]
            self._forget(model)
        closed = model.device.call(model.do_close)
        closed.add_done_callback(partial(_note_closed, model.name))
        model.device.stop()
        return closed

    def discard(self, model: LoadedModel) -> None:
        """Hand the model to nobody any more: it failed. Its leases stay valid."""
        with self._lock:
            self._forget(model)

    def close(self) -> None:
        """Close everything, waiting for calls in flight. For the end of the process."""
        with self._lock:
            models = list(self._leases)
            self._leases.clear()
            self._models.clear()
        for model in models:
            model.device.stop(last=model.do_close)
        for model in models:
            model.device.join(EXIT_TIMEOUT_S)

    def follow_forks(self) -> None:
        """Let a forked process begin with an empty cache: threads do not survive, so loads anew."""
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._lock.acquire,
                after_in_parent=self._lock.release,
                after_in_child=self._begin_anew,
            )

    def _begin_anew(self) -> None:
        for model in self._leases:
            # Never freed here: onnxruntime would join threads that only the parent has, and abort.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(model))
        self._models.clear()
        self._leases.clear()
        self._lock.release()

    def _forget(self, model: LoadedModel) -> None:
        for key in [key for key, known in self._models.items() if known is model]:
            del self._models[key]


def _note_closed(name: str, closed: "asyncio.Future[None]") -> None:
    if not closed.cancelled() and (error := closed.exception()) is not None:
        logger.error("model %s cannot be freed", name, exc_info=error)


MODELS = ModelCache()
MODELS.follow_forks()
atexit.register(MODELS.close)
