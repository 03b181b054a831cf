"""Runs an exported step graph with onnxruntime: numpy and onnxruntime only, no torch.

One graph run for each row. Keys and values lie in one numpy buffer per slot; the graph reads the
cached part where it lies and returns the window's, of which the final rows are appended. A run of
a small model takes a few milliseconds, so inputs are bound, not passed: a binding per slot, whose
cache is bound anew only after it has grown by a few blocks.

Shapes: W window, P cached positions, R masks of the window, L layers, KV key/value heads, hd head
size, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort

from d2f_runtime.backends.base import ModelInfo, Slot, StepRow
from d2f_runtime.backends.onnx_session import open_session
from d2f_runtime.backends.rows import Bools, Floats, Ints, check_row, num_forwarded, to_proposals
from d2f_runtime.manifest import Manifest, read_manifest
from d2f_runtime.window import Proposals
from d2f_stream.errors import InvalidParams, OutOfCapacity, UnsupportedModel
from d2f_stream.params import GenerationParams

__all__ = ["GRAPH_FILE", "OnnxBackend", "load"]

GRAPH_FILE: Final = "model.onnx"
DEFAULT_CACHE_BYTES: Final = 1 << 30
PAST_STEP: Final = 32  # tokens; the cache is bound in multiples of it


@dataclass(slots=True)
class _Cache:
    """A slot: its K/V, and the graph inputs that outlive a step."""

    buffer: Floats  # [2 L, capacity, KV hd]
    last_hidden: Floats  # [1, D]
    binding: Any
    num_cached: int = 0
    num_bound: int = -1  # cached positions that are bound as inputs
    bound_shape: tuple[int, int] = (-1, -1)  # W and R for which the outputs are bound
    start: Ints = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    in_full: Bools = field(default_factory=lambda: np.zeros((), dtype=np.bool_))
    temperature: Floats = field(default_factory=lambda: np.zeros(1, dtype=np.float32))

    @property
    def capacity(self) -> int:
        return int(self.buffer.shape[1])


@dataclass(frozen=True, slots=True)
class _Stepped:
    """What a run leaves behind for the slot; applied when all rows of the step have run."""

    cache: _Cache
    num_cached: int
    last_hidden: Floats | None


class OnnxBackend:
    """Implements Backend with onnxruntime.

    Args:
        session: of a graph that d2f_export.onnx_graph wrote.
        manifest: of its folder.
        device: "cpu" or "cuda:0".
        max_tokens: K/V places over all slots; None takes what fits in 1 GiB, at least max_len.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        manifest: Manifest,
        *,
        device: str = "cpu",
        max_tokens: int | None = None,
    ) -> None:
        self.info = _model_info(manifest, device)
        shape = manifest.transformer
        self._session: ort.InferenceSession | None = session
        self._width = shape.num_kv_heads * shape.head_dim
        self._hidden_size = shape.hidden_size
        self._past_names = [f"past.{i}.{x}" for i in range(shape.num_layers) for x in "kv"]
        states = ["states"] if manifest.shift_logits else []
        self._output_names = ["proposals", *states, "new"]
        fitting = DEFAULT_CACHE_BYTES // self.info.kv_bytes_per_token
        self._max_tokens = max(manifest.max_len, fitting) if max_tokens is None else max_tokens
        self._num_reserved = 0
        self._slots: dict[Slot, _Cache] = {}
        self._next_slot = 0

    def check(self, params: GenerationParams) -> None:
        """Refuse nucleus sampling, which the graph does not hold.

        Raises:
            InvalidParams: top_p is below 1.
        """
        if params.top_p < 1.0:
            raise InvalidParams("top_p", params.top_p, "1 with the onnx backend; torch has top_p")

    def open_slot(self, capacity: int, *, prefix: Slot | None = None) -> Slot:
        """Reserve K/V storage for `capacity` tokens, optionally starting as a copy of `prefix`.

        Raises:
            OutOfCapacity: all slots together would hold too many tokens.
        """
        source = None if prefix is None else self._slots[prefix]
        if source and source.num_cached > capacity:
            raise ValueError(f"the prefix holds {source.num_cached} tokens, the slot {capacity}")
        free = self._max_tokens - self._num_reserved
        if capacity > free:
            raise OutOfCapacity(
                f"no room for the K/V of {capacity} tokens: {free} of {self._max_tokens} are free"
            )
        cache = self._new_cache(capacity)
        if source:
            num = cache.num_cached = source.num_cached
            cache.buffer[:, :num] = source.buffer[:, :num]
            cache.last_hidden[:] = source.last_hidden
        self._num_reserved += capacity
        slot = Slot(self._next_slot)
        self._next_slot += 1
        self._slots[slot] = cache
        return slot

    def step(self, rows: Sequence[StepRow]) -> list[Proposals]:
        """Run the graph for each row, in order; cache the first `num_to_cache` of each."""
        caches = [self._slots[row.slot] for row in rows]
        for row, cache in zip(rows, caches, strict=True):
            check_row(row, num_cached=cache.num_cached, capacity=cache.capacity)
            if row.top_p < 1.0 and row.temperature > 0:
                raise ValueError("the onnx backend cannot sample with top_p below 1; see check()")
        # Lookahead branches share a slot and must all see it as it was.
        proposals: list[Proposals] = []
        stepped: list[_Stepped] = []
        for row, cache in zip(rows, caches, strict=True):
            proposed, after = self._run(row, cache)
            proposals.append(proposed)
            stepped.append(after)
        for after in stepped:
            after.cache.num_cached = after.num_cached
            if after.last_hidden is not None:
                after.cache.last_hidden[:] = after.last_hidden
        return proposals

    def close_slot(self, slot: Slot) -> None:
        """Free the slot's storage. Idempotent."""
        if cache := self._slots.pop(slot, None):
            self._num_reserved -= cache.capacity

    def close(self) -> None:
        """Free the session. Idempotent."""
        self._slots.clear()
        self._session = None

    def _new_cache(self, capacity: int) -> _Cache:
        assert self._session is not None, "the backend is closed"
        shape = (len(self._past_names), capacity, self._width)
        cache = _Cache(
            buffer=np.zeros(shape, dtype=np.float32),
            last_hidden=np.zeros((1, self._hidden_size), dtype=np.float32),
            binding=self._session.io_binding(),
        )
        fixed = {"start": cache.start, "temperature": cache.temperature, "in_full": cache.in_full}
        if self.info.shift_logits:
            fixed["last_hidden"] = cache.last_hidden
        for name, array in fixed.items():
            cache.binding.bind_cpu_input(name, array)
        for name in self._output_names:  # get_outputs() keeps this order
            cache.binding.bind_output(name, "cpu")
        return cache

    def _run(self, row: StepRow, cache: _Cache) -> tuple[Proposals, _Stepped]:
        assert self._session is not None, "the backend is closed"
        window = row.window
        # A lone placeholder is forwarded after all: a graph needs a row, and nobody sees this one.
        length = max(1, num_forwarded(window, self.info))
        masks = [i for i, token in enumerate(window.tokens) if token == self.info.mask_id]
        head_rows = self._head_rows(masks, window.num_to_cache)
        cache.start[0], cache.temperature[0] = window.start, row.temperature
        cache.in_full[()] = row.temperature > 0 or row.rank != "confidence"
        uniforms = row.uniforms or [0.0] * len(window.tokens)
        unused = [0.0] * (len(head_rows) - len(masks))
        inputs = {
            "tokens": np.array([window.tokens[:length]], dtype=np.int64),
            "visible_until": np.array([window.visible_until()[:length]], dtype=np.int64),
            "head_rows": np.array([head_rows], dtype=np.int64),
            "uniforms": np.array([[uniforms[i] for i in masks] + unused], dtype=np.float32),
        }
        for name, array in inputs.items():
            cache.binding.bind_cpu_input(name, array)
        self._bind_past(cache, window.start)
        self._bind_outputs(cache, (length, len(head_rows)))
        self._session.run_with_iobinding(cache.binding)
        values = zip(self._output_names, cache.binding.get_outputs(), strict=True)
        outputs = {name: value.numpy() for name, value in values}
        answers = outputs["proposals"][:, 0, : len(masks)]
        stepped = self._store(row, cache, outputs, head_rows)
        return to_proposals([row], [masks], answers)[0], stepped

    def _head_rows(self, masks: list[int], num_to_cache: int) -> list[int]:
        """Return the masks, and where they lack it the position that the last cached one predicts.

        At least one: the graph needs a row here too.
        """
        if self.info.shift_logits and num_to_cache and num_to_cache not in masks:
            return [*masks, num_to_cache]
        return masks or [0]

    def _bind_outputs(self, cache: _Cache, shape: tuple[int, int]) -> None:
        """Bind the outputs anew where their shape changes; a bound output keeps its first."""
        if cache.bound_shape == shape:
            return
        for name in self._output_names:
            cache.binding.bind_output(name, "cpu")
        cache.bound_shape = shape

    def _bind_past(self, cache: _Cache, start: int) -> None:
        """Bind the cached positions of every layer, where they lie.

        A few more than `start`, so that this is rarely done: `start` masks them.
        """
        stop = min(-(-start // PAST_STEP) * PAST_STEP, cache.capacity)
        if cache.num_bound == stop:
            return
        address, stride = cache.buffer.ctypes.data, cache.buffer.strides[0]
        shape = (1, stop, self._width)
        for index, name in enumerate(self._past_names):
            place = address + index * stride
            cache.binding.bind_input(name, "cpu", 0, np.float32, shape, place)
        cache.num_bound = stop

    def _store(
        self, row: StepRow, cache: _Cache, outputs: dict[str, Floats], head_rows: list[int]
    ) -> _Stepped:
        """Append what became final. A branch of the same slot stores the same again."""
        start, num = row.window.start, row.window.num_to_cache
        if not num:
            return _Stepped(cache, start, None)
        cache.buffer[:, start : start + num] = outputs["new"][:, :num]
        if not self.info.shift_logits:
            return _Stepped(cache, start + num, None)
        state = outputs["states"][:, head_rows.index(num)]
        return _Stepped(cache, start + num, state.copy())  # the next run writes the same memory


def load(path: Path, *, device: str = "auto", quantization: str = "auto") -> OnnxBackend:
    """Load a model folder (manifest.json, model.onnx).

    Args:
        path: the folder.
        device: "auto" is CUDA where onnxruntime has it and the weights are not int8, which only
            its CPU kernels run; "cpu", "cuda" or "cuda:0".
        quantization: "auto", or what the artefact holds.

    Raises:
        ModelNotFound: the folder or its manifest is missing.
        ModelDamaged: the graph is missing, cannot be read, or is not a step graph.
        UnsupportedModel: onnxruntime is too old, has no such device, or the weights are others.
    """
    manifest = read_manifest(path)
    stored = "fp32" if manifest.onnx is None else manifest.onnx.quantization
    if quantization not in ("auto", stored):
        raise UnsupportedModel(
            f"quantization is {quantization!r} but {path.name} holds {stored!r}; "
            "an ONNX graph is quantized when it is exported"
        )
    session, device = open_session(path / GRAPH_FILE, manifest, device)
    return OnnxBackend(session, manifest, device=device)


def _model_info(manifest: Manifest, device: str) -> ModelInfo:
    shape = manifest.transformer
    return ModelInfo(
        name=manifest.name,
        family=manifest.family,
        mask_id=manifest.mask_id,
        eos_ids=manifest.eos_ids,
        shift_logits=manifest.shift_logits,
        prompt_attention=manifest.prompt_attention,
        native_block_size=manifest.native_block_size,
        max_block_size=manifest.max_block_size,
        max_len=manifest.max_len,
        vocab_size=manifest.vocab_size,
        kv_bytes_per_token=2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 4,
        device=device,
        quantization="fp32" if manifest.onnx is None else manifest.onnx.quantization,
    )
