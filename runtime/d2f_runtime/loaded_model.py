"""LoadedModel: a backend, its codec and the device thread that both live on; shared by the process.

Weights belong to the process and step loops to event loops: engines of several loops, in several
threads, may lease one loaded model, because every backend call goes through its one device thread.
The cache is the only state of the package that outlives an event loop; it is closed at exit.
"""

import asyncio
import atexit
import ctypes
import logging
import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field, replace
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from d2f_runtime.backends.base import Backend, Slot, StepRow
from d2f_runtime.decoding.window import Proposals
from d2f_runtime.device import DeviceThread
from d2f_runtime.models.facts import ModelInfo
from d2f_runtime.models.hub import HubModel
from d2f_runtime.prefix_cache import PrefixCache
from d2f_runtime.text.tokenizer import TextCodec
from d2f_stream.core.errors import EngineFailed, OutOfCapacity
from d2f_stream.core.params import GenerationParams

__all__ = ["MODELS", "LoadedModel", "ModelCache", "ModelKey", "ModelParts", "Opened", "SlotOwner"]

logger = logging.getLogger("d2f_stream.loaded_model")

MAX_KEPT: Final = 64  # slots of ended sessions whose K/V may serve prompts to come

EXIT_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class ModelKey:
    """What makes two loaded models the same."""

    path: Path | HubModel
    backend: str
    device: str
    quantization: str
    adapter: Path | HubModel | None = None
    kv_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ModelParts:
    """What loading a model yields.

    `info` is the backend's, with a description, and with a name where its folder is not its name.
    """

    backend: Backend
    codec: TextCodec
    defaults: GenerationParams
    description: InitVar[str] = ""
    name: InitVar[str | None] = None
    info: ModelInfo = field(init=False)

    def __post_init__(self, description: str, name: str | None) -> None:
        info = self.backend.info
        info = replace(info, name=name or info.name, description=description or info.description)
        object.__setattr__(self, "info", info)


class SlotOwner(Protocol):
    """Who opens slots, and may be gone before it has closed them."""

    def is_gone(self) -> bool:
        """Whether nobody can run it any more. If so, none of its steps that wait is run, ever."""
        ...


class Opened(NamedTuple):
    """A slot, and how many of the prompt's first tokens it holds already."""

    slot: Slot
    num_cached: int


class _Prompt(NamedTuple):
    tokens: Sequence[int]
    scope: str
    capacity: int


class LoadedModel:
    """A model on its device thread. The methods named `do_*` run there and block; others do not.

    Loading begins with the first `do_load`, whose outcome, good or bad, is kept.

    Attributes:
        prefixes: what is stored beyond its session, for prompts to come; None where nothing is.
            Belongs to the device thread; elsewhere only its counters may be read.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], ModelParts],
        *,
        key: ModelKey | None = None,
        keeps_prefixes: bool = False,
    ) -> None:
        self.name = name
        self.key = key
        self.device = DeviceThread(f"d2f-device-{name}", on_idle=self._do_look)
        self._load = load
        self._parts: ModelParts | None = None
        self._failure: BaseException | None = None
        self._owners: dict[Slot, SlotOwner] = {}
        self._waiting: dict[SlotOwner, Callable[[], object]] = {}
        self._max_kept = MAX_KEPT if keeps_prefixes else 0
        self.prefixes: PrefixCache[Slot] | None = None
        self._fresh: dict[Slot, _Prompt] = {}  # prompts that the next step stores

    def do_load(self) -> ModelParts:
        """Return the parts, loading them first where that was not done yet."""
        if self._failure is not None:
            raise self._failure
        if self._parts is None:
            try:
                self._parts = self._load()
            except Exception as error:
                self._failure = error
                raise
            info = self._parts.backend.info
            # With both, what follows the prompt is predicted from a state that is not kept.
            is_lost = info.prompt_attention == "full" and info.shift_logits
            # And no answer may depend on whether somebody asked something like it before.
            if self._max_kept and not (is_lost or info.window_scaled):
                self.prefixes = PrefixCache(
                    info.prompt_attention, info.native_block_size, max_kept=self._max_kept
                )
            logger.info("loaded %s on %s as %s", self.name, info.device, info.quantization)
        return self._parts

    def do_warm_up(self) -> None:
        """Let the backend prepare its steps. What it raises leaves the model unusable, as a step's.

        Raises:
            EngineFailed: an earlier step failed.
        """
        backend = self._backend
        try:
            backend.warm_up()
        except BaseException as error:
            self._failure = error
            raise

    def do_open_slot(
        self,
        owner: SlotOwner,
        capacity: int,
        on_free: Callable[[], object],
        *,
        prompt: Sequence[int] = (),
        scope: str = "",
    ) -> Opened | None:
        """Open a slot of `capacity` tokens; None where it must wait for others to close.

        In that case `on_free` is called once, here, when the next slot was closed. Slots of owners
        that are gone are closed first. An event loop may be closed without a word while others wait
        for its slots, so they should ask again now and then.

        Where an earlier slot of the same scope holds K/V that the prompt begins with, these are
        copied. Slots that are kept for that only give way, least recently used first.

        Raises:
            OutOfCapacity: there is no room although no slot is open.
        """
        self.do_reclaim()
        match = self.prefixes.find(prompt, scope) if self.prefixes and prompt else None
        while True:
            try:
                slot = self._backend.open_slot(capacity)
                break
            except OutOfCapacity:
                evicted = self.prefixes.evict() if self.prefixes is not None else None
                if evicted is not None:
                    self._backend.close_slot(evicted)
                    match = None if match is not None and match.slot == evicted else match
                    continue
                if not self._owners:
                    raise
                self._waiting[owner] = on_free
                return None
        self._owners[slot] = owner
        if self.prefixes is not None and prompt:
            self._fresh[slot] = _Prompt(prompt, scope, capacity)
        if match is None:
            return Opened(slot, 0)
        self._backend.copy_prefix(match.slot, slot, match.num_tokens)
        return Opened(slot, match.num_tokens)

    def do_step(self, rows: Sequence[StepRow]) -> list[Proposals]:
        """Run a step. Whatever it raises leaves the model unusable: CUDA errors are sticky.

        Raises:
            EngineFailed: an earlier step failed.
        """
        backend = self._backend
        try:
            proposals = backend.step(rows)
        except BaseException as error:
            self._failure = error
            raise
        if self.prefixes is not None and self._fresh:
            for row in rows:
                if (asked := self._fresh.pop(row.slot, None)) is not None:
                    stored = asked.tokens[: row.window.start + row.window.num_to_cache]
                    self.prefixes.opened(row.slot, stored, asked.scope, capacity=asked.capacity)
        if self.prefixes is not None:
            for row, proposed in zip(rows, proposals, strict=True):
                if not math.isfinite(sum(proposed.confidence)):  # nor is what the slot stores
                    self.prefixes.forget(row.slot)
        return proposals

    def do_retire_slots(self, ended: Sequence[tuple[Slot, Callable[[], Sequence[int]]]]) -> None:
        """Close slots of sessions that ended, or keep what they hold for prompts to come.

        Args:
            ended: each with a function that returns the tokens whose K/V it holds.
        """
        closed: list[Slot] = []
        for slot, cached_tokens in ended:
            if self.prefixes is None or self._failure is not None:
                closed.append(slot)
                continue
            self._owners.pop(slot, None)
            self._fresh.pop(slot, None)
            closed += self.prefixes.ended(slot, cached_tokens())
        self.do_close_slots(closed)

    def do_close_slots(self, slots: Sequence[Slot]) -> None:
        """Close slots, all of them even where one fails. Wakes those who wait for room.

        Raises:
            Exception: what the backend raised for the first that failed.
        """
        failures: list[Exception] = []
        for slot in slots:
            self._owners.pop(slot, None)
            self._fresh.pop(slot, None)
            if self.prefixes is not None:
                self.prefixes.forget(slot)
            try:
                self._backend_of_any_health.close_slot(slot)
            except Exception as error:
                failures.append(error)
        waiting, self._waiting = self._waiting, {}
        for on_free in waiting.values():
            on_free()
        if failures:
            raise failures[0]

    def do_reclaim(self) -> None:
        """Close the slots of owners that are gone."""
        for owner in {owner for owner in self._owners.values() if owner.is_gone()}:
            logger.warning("model %s takes slots back: their event loop is gone", self.name)
            self.do_close_slots_of(owner)

    def _do_look(self) -> bool:
        """Reclaim; return whether slots are left that are worth looking at again."""
        self.do_reclaim()
        return bool(self._owners)

    def do_close_slots_of(self, owner: SlotOwner) -> None:
        """Close every slot that the owner opened, also those it was never told of."""
        self.do_close_slots([slot for slot, known in self._owners.items() if known is owner])

    def do_close(self) -> None:
        """Free the model. Idempotent."""
        parts, self._parts = self._parts, None
        if parts is not None:
            parts.backend.close()
            logger.info("closed %s", self.name)

    @property
    def _backend(self) -> Backend:
        if self._failure is not None:
            raise EngineFailed(f"model {self.name} failed: {self._failure!r}") from self._failure
        return self._backend_of_any_health

    @property
    def _backend_of_any_health(self) -> Backend:
        assert self._parts is not None, "a slot or step was asked of a model that is not loaded"
        return self._parts.backend


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


MODELS = ModelCache()
MODELS.follow_forks()
atexit.register(MODELS.close)
