"""OnnxBackend: an exported step graph under onnxruntime: numpy and onnxruntime only, no torch.

One graph run for each row; K/V stay where they are, see OnnxSlot. A graph with static shapes gets
its window padded: rows that nobody sees, whose K/V are overwritten by the next step.

Shapes: W window, R predicted positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2f_runtime.backends.base import Slot, StepRow
from d2f_runtime.backends.onnx_session import StepSession, open_sessions
from d2f_runtime.backends.onnx_slot import ALIKE_ROWS, OnnxSlot
from d2f_runtime.backends.rows import (
    Floats,
    check_rows,
    divisor_of,
    num_forwarded,
    shifted_positions,
    to_proposals,
)
from d2f_runtime.decoding.window import Proposals
from d2f_runtime.models.facts import ModelInfo
from d2f_runtime.models.manifest import Manifest, read_manifest
from d2f_stream.core.errors import InvalidParams, OutOfCapacity, UnsupportedModel
from d2f_stream.core.params import GenerationParams

__all__ = ["OnnxBackend", "load"]

DEFAULT_CACHE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What one run takes beside K/V and state, which graph, and where the masks are."""

    session: StepSession
    masks: list[int]
    host: dict[str, Any]


class OnnxBackend:
    """Implements Backend with onnxruntime.

    Args:
        sessions: of `open_sessions`.
        manifest: of their folder.
        max_tokens: K/V places over all slots; None takes what fits in 1 GiB, at least max_len.
    """

    def __init__(
        self,
        sessions: Sequence[StepSession],
        manifest: Manifest,
        *,
        max_tokens: int | None = None,
    ) -> None:
        self._sessions = list(sessions)
        self._manifest = manifest
        self.info = _model_info(manifest, self._sessions[-1])
        fitting = DEFAULT_CACHE_BYTES // self.info.kv_bytes_per_token
        self._max_tokens = max(manifest.max_len, fitting) if max_tokens is None else max_tokens
        self._num_reserved = 0
        self._slots: dict[Slot, OnnxSlot] = {}
        self._next_slot = 0

    @property
    def sessions(self) -> Sequence[StepSession]:
        """The graphs, narrowest first; for comparisons and benchmarks."""
        return self._sessions

    def check(self, params: GenerationParams) -> None:
        """Refuse nucleus sampling, which the graph does not hold.

        Raises:
            InvalidParams: top_p is below 1, and the answer is sampled.
        """
        if params.top_p < 1.0 and params.temperature > 0:
            raise InvalidParams("top_p", params.top_p, "1 with the onnx backend; torch has top_p")

    def warm_up(self) -> None:
        """Do nothing: a graph is ready once it is loaded."""

    def open_slot(self, capacity: int) -> Slot:
        """Reserve K/V storage for `capacity` tokens.

        Raises:
            OutOfCapacity: all slots together would hold too many tokens, or this one more than a
                graph with static shapes does.
        """
        fixed = self._widest.fixed
        if fixed is not None and capacity > fixed.capacity:
            raise OutOfCapacity(
                f"no room for the K/V of {capacity} tokens: the graph of model {self.info.name} "
                f"holds {fixed.capacity}; export it with a larger --capacity"
            )
        free = self._max_tokens - self._num_reserved
        if capacity > free:
            raise OutOfCapacity(
                f"no room for the K/V of {capacity} tokens: {free} of {self._max_tokens} are free"
            )
        opened = OnnxSlot(capacity, self._widest, self._manifest, alike=self._computes_alike)
        self._num_reserved += capacity
        slot = Slot(self._next_slot)
        self._next_slot += 1
        self._slots[slot] = opened
        return slot

    def step(self, rows: Sequence[StepRow]) -> list[Proposals]:
        """Run the graph for each row, in order; cache the first `num_to_cache` of each."""
        opened = [self._slots[row.slot] for row in rows]
        check_rows(rows, opened)
        if any(row.top_p < 1.0 and row.temperature > 0 for row in rows):
            raise ValueError("the onnx backend cannot sample with top_p below 1; see check()")
        return [self._run(row, slot) for row, slot in zip(rows, opened, strict=True)]

    def copy_prefix(self, source: Slot, target: Slot, num_tokens: int) -> None:
        """Store in `target`, which holds nothing yet, what `source` holds for its first tokens."""
        self._slots[target].copy_from(self._slots[source], num_tokens)

    def close_slot(self, slot: Slot) -> None:
        """Free the slot's storage. Idempotent."""
        if closed := self._slots.pop(slot, None):
            self._num_reserved -= closed.capacity

    def close(self) -> None:
        """Free the sessions. Idempotent."""
        self._slots.clear()
        self._sessions.clear()

    @property
    def _computes_alike(self) -> bool:
        """Whether a row is to be computed to the same bit whatever rows are beside it.

        Integer products are; what is left is the order of sums in attention.
        """
        return self.info.quantization == "int4-int8" and self._widest.fixed is None

    @property
    def _widest(self) -> StepSession:
        assert self._sessions, "the backend is closed"
        return self._sessions[-1]

    def logits(self, row: StepRow) -> Floats:
        """Return [masks, V] logits before temperature, padded ids included; caches nothing.

        For comparisons: K/V and logits pass through the host.
        """
        slot, inputs = self._slots[row.slot], self._inputs(row)
        states = slot.read(inputs.session, row.window.start)
        (found,) = inputs.session.session.run(["logits"], inputs.host | states)
        logits: Floats = found[0, : len(inputs.masks)]
        return logits

    def _run(self, row: StepRow, slot: OnnxSlot) -> Proposals:
        inputs = self._inputs(row)
        answers: Floats = np.empty((4, 1, inputs.host["head_rows"].shape[1]), np.float32)
        start, width = row.window.start, inputs.host["tokens"].shape[1]
        io = slot.bind(inputs.session, start, width, inputs.host, answers)
        inputs.session.session.run_with_iobinding(io)
        slot.keep(start, row.window.num_to_cache)
        masks = inputs.masks
        return to_proposals([row], [masks], answers[:, 0, : len(masks)])[0]

    def _inputs(self, row: StepRow) -> "_Inputs":
        window = row.window
        num_rows = num_forwarded(window, self.info)
        fewest = ALIKE_ROWS if self._computes_alike else 1  # instead of placeholders, any token
        length = max(fewest, num_rows)
        masks = window.asked(self.info.mask_id)
        asked = masks
        if self.info.drafts_in_place:
            asked = shifted_positions(masks, window.num_to_cache)
        head_rows = self._head_rows(asked, window.num_to_cache)
        session = self._session_for(length)
        width, num_heads = length, max(fewest, len(head_rows))
        if session.fixed is not None:
            width = num_heads = session.fixed.width
        host: dict[str, Any] = {
            "tokens": np.zeros((1, width), np.int64),
            # padded rows see the whole window, so that no softmax is empty
            "visible_until": np.full((1, width), window.start + width, np.int64),
            "head_rows": np.zeros((1, num_heads), np.int64),
            "uniforms": np.zeros((1, num_heads), np.float32),
            "start": np.array([window.start], np.int64),
            "temperature": np.array([divisor_of(row)], np.float32),
            "in_full": np.array(row.temperature > 0 or row.rank != "confidence"),
        }
        host["tokens"][0, :num_rows] = window.tokens[:num_rows]
        visible_until = window.visible_until()[:length]
        host["visible_until"][0, : len(visible_until)] = visible_until
        host["head_rows"][0, : len(head_rows)] = head_rows
        if row.uniforms:
            host["uniforms"][0, : len(masks)] = [row.uniforms[i] for i in masks]
        if self._manifest.onnx is not None and self._manifest.onnx.drafts:
            host["is_draft"] = np.zeros((1, width), np.bool_)
            host["is_draft"][0, window.num_to_cache : num_rows] = True
        if self.info.shift_logits:
            keep = head_rows.index(window.num_to_cache) if window.num_to_cache else 0
            host["keep"] = np.array([keep], np.int64)
        return _Inputs(session, masks, host)

    def _session_for(self, length: int) -> StepSession:
        """Return the narrowest graph that holds a window."""
        for session in self._sessions:
            if session.fixed is None or length <= session.fixed.width:
                return session
        raise ValueError(f"a window of {length} positions is wider than the graph's")

    def _head_rows(self, masks: list[int], num_to_cache: int) -> list[int]:
        """Return the masks, and where they lack it the position that the last cached one predicts.

        At least one: the graph needs a row here too.
        """
        if self.info.shift_logits and num_to_cache and num_to_cache not in masks:
            return [*masks, num_to_cache]
        return masks or [0]


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
    return OnnxBackend(open_sessions(path, manifest, device), manifest)


def _model_info(manifest: Manifest, session: StepSession) -> ModelInfo:
    shape = manifest.transformer
    kind, index = session.device
    elements = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    max_len = manifest.max_len
    if session.fixed is not None:
        max_len = min(max_len, session.fixed.capacity, session.fixed.width)
    quantization = "fp32" if manifest.onnx is None else manifest.onnx.quantization
    return ModelInfo(
        **manifest.facts | {"max_len": max_len},
        name=manifest.name,
        kv_bytes_per_token=elements * session.dtype.itemsize,
        device=kind if kind == "cpu" else f"{kind}:{index}",
        quantization=quantization,
        window_scaled=quantization == "int8",
        one_by_one=True,
    )
