"""LoadedModel: a backend, its codec and the device thread that both live on; shared by the process.

Weights belong to the process and step loops to event loops: engines of several loops, in several
threads, may lease one loaded model, because every backend call goes through its one device thread.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

from d2f_runtime.backends.base import Backend, Slot, StepRow
from d2f_runtime.decoding.window import Proposals
from d2f_runtime.device import DeviceThread
from d2f_runtime.loaded_model.parts import ModelKey, ModelParts
from d2f_runtime.prefix_cache import PrefixCache
from d2f_stream.core.errors import EngineFailed, OutOfCapacity

__all__ = ["LoadedModel", "Opened", "SlotOwner"]

logger = logging.getLogger("d2f_stream.loaded_model")

MAX_KEPT: Final = 64  # slots of ended sessions whose K/V may serve prompts to come


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
        self._fresh: dict[Slot, _Prompt] = {}  # prompts that the next steps store

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
            info = self._parts.info
            # With both, what follows the prompt is predicted from a state that is not kept.
            is_lost = info.prompt_attention == "full" and info.shift_logits
            # And no answer may depend on whether somebody asked something like it before.
            if self._max_kept and not (is_lost or info.window_scaled):
                self.prefixes = PrefixCache(
                    info.prompt_attention, info.native_block_size, max_kept=self._max_kept
                )
            logger.info("loaded %s on %s as %s", info.name, info.device, info.quantization)
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
                if (asked := self._fresh.get(row.slot)) is not None:
                    stored = asked.tokens[: row.window.start + row.window.num_to_cache]
                    self.prefixes.opened(row.slot, stored, asked.scope, capacity=asked.capacity)
                    if row.window.num_to_cache < len(row.window.tokens):  # no piece of the prompt
                        del self._fresh[row.slot]
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
