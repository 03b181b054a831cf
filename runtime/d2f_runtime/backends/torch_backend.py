"""Runs a `Transformer` with torch on a CPU or one GPU: all rows of a step in one padded forward.

A step makes one host-to-device copy of what numpy packed (two when something is sampled) and one
device-to-host copy of the answers.

Shapes: B rows, W longest window, P longest cache, N masks over all rows, D hidden size.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2f_runtime.backends.base import ModelInfo, Slot, StepRow
from d2f_runtime.backends.kv_pool import KVPool, PooledPast, Span, ranges
from d2f_runtime.backends.rows import Floats, Ints, check_row, num_forwarded, to_proposals
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.sampling import forbid, keep_nucleus, propose, temper
from d2f_runtime.models.transformer import Transformer, block_causal_mask
from d2f_runtime.window import Proposals
from d2f_stream.errors import UnsupportedModel
from d2f_stream.params import GenerationParams

__all__ = ["TorchBackend", "load"]

DEFAULT_POOL_BYTES = 1 << 30
MAX_HEAD_ELEMENTS = 1 << 27  # logits of one head call; bounds its memory at large vocabularies

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class _Batch:
    """A step's rows as arrays; what crosses to the device is packed by `integers`."""

    tokens: Ints  # [B, W], padded with 0
    visible: Ints  # [B, W]
    start: Ints  # [B]
    offset: Ints  # [B] first pool place of each row's slot
    slot_index: Ints  # [B]
    masks: list[list[int]]  # for each row its window positions with a mask, N in all
    head_rows: Ints  # [N] rows of [last_hidden; hidden] (shifted) or hidden, flattened
    store_from: Ints  # [M] rows of flattened hidden to cache
    store_to: Ints  # [M] pool places
    last_from: Ints  # [S] flattened row of each storing slot's last cached position
    last_to: Ints  # [S]

    def integers(self) -> list[Ints]:
        return [
            self.tokens, self.visible, self.start, self.offset, self.slot_index,
            self.head_rows, self.store_from, self.store_to, self.last_from, self.last_to,
        ]  # fmt: skip


class TorchBackend:
    """Implements Backend with torch.

    Args:
        model: weights; shared where they already have `device` and `dtype`, else copied.
        name: for people.
        device: "cpu", "cuda" or "cuda:0".
        dtype: of weights and K/V; the head's softmax is fp32.
        max_tokens: K/V places over all slots; None takes what fits in 1 GiB, at least max_len.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        name: str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_tokens: int | None = None,
    ) -> None:
        config = model.config
        self._config = config
        self._device = torch.device(device)
        self._dtype = dtype
        weight = model.embed_tokens.weight
        if weight.device.type != self._device.type or weight.dtype != dtype:
            model = copy.deepcopy(model).to(device=self._device, dtype=dtype)
        self._model: Transformer | None = model
        self.info = _model_info(config, name, str(self._device), dtype)
        if max_tokens is None:
            fitting = DEFAULT_POOL_BYTES // self.info.kv_bytes_per_token
            max_tokens = max(config.max_len, fitting)
        self._pool = KVPool(config, max_tokens, self._device, dtype)

    def check(self, params: GenerationParams) -> None:
        """Accept every setting: sampling is complete here."""

    @torch.inference_mode()
    def open_slot(self, capacity: int, *, prefix: Slot | None = None) -> Slot:
        """Reserve K/V storage for `capacity` tokens, optionally starting as a copy of `prefix`.

        Raises:
            OutOfCapacity: the pool has no span that long, or all slots are open.
        """
        return self._pool.open(capacity, prefix)

    @torch.inference_mode()
    def step(self, rows: Sequence[StepRow]) -> list[Proposals]:
        """Run one forward for all rows, in order; cache the first `num_to_cache` of each."""
        if not rows:
            return []
        spans = [self._pool[row.slot] for row in rows]
        for row, span in zip(rows, spans, strict=True):
            check_row(row, num_cached=span.num_cached, capacity=span.capacity)
        batch = _pack(rows, spans, self.info)
        answers = self._run(batch, *_sampling(rows, batch.masks))
        for row, span in zip(rows, spans, strict=True):
            span.num_cached = row.window.start + row.window.num_to_cache
        return to_proposals(rows, batch.masks, answers)

    def close_slot(self, slot: Slot) -> None:
        """Free the slot's storage. Idempotent."""
        self._pool.close(slot)

    def close(self) -> None:
        """Free the weights and the pool. Idempotent; slots may still be closed."""
        self._model = None
        self._pool.clear()

    def _run(self, batch: _Batch, sampling: Floats | None, nucleus: bool) -> Floats:
        """Return [4, N] token, confidence, margin, neg_entropy; store K/V and last states."""
        assert self._model is not None, "the backend is closed"
        parts = self._to_device(batch.integers())
        tokens, visible, start, offset, slot_index = parts[:5]
        head_rows, store_from, store_to, last_from, last_to = parts[5:]
        last_hidden = self._pool.last_hidden[slot_index]
        if batch.tokens.shape[1]:
            past, num_cached = self._past(batch, offset)
            mask = block_causal_mask(start, visible, num_cached)
            positions = start[:, None] + torch.arange(tokens.shape[1], device=self._device)
            hidden, new = self._model(tokens, positions, mask, past)
            hidden = hidden.flatten(0, 1)  # [B W, D]
            if len(batch.store_from):
                fresh = torch.stack([x.flatten(0, 1) for pair in new for x in pair])
                self._pool.store[:, store_to] = fresh[:, store_from]
                self._pool.last_hidden[last_to] = hidden[last_from]
        else:
            hidden = last_hidden[:0]
        if not len(batch.head_rows):
            return np.zeros((4, 0), dtype=np.float32)
        states = torch.cat([last_hidden, hidden]) if self._config.shift_logits else hidden
        return self._propose(states[head_rows], sampling, nucleus)

    def _propose(self, states: Tensor, sampling: Floats | None, nucleus: bool) -> Floats:
        """Run head and sampler over [N, D] states, in pieces of bounded memory."""
        assert self._model is not None, "the backend is closed"
        noise = None if sampling is None else torch.from_numpy(sampling).to(self._device)
        config = self._config
        answers: list[Tensor] = []
        length = max(1, MAX_HEAD_ELEMENTS // config.vocab_size)
        for begin in range(0, states.shape[0], length):
            piece = slice(begin, begin + length)
            logits = forbid(
                self._model.logits(states[piece]),
                mask_id=config.mask_id,
                num_tokens=config.num_tokens,
            )
            if noise is None:
                proposed = propose(logits)
            else:
                temperature, top_p, uniforms = noise[:, piece]
                logits = temper(logits, temperature)
                if nucleus:
                    greedy_keeps_all = torch.where(temperature > 0, top_p, 1.0)
                    logits = keep_nucleus(logits, greedy_keeps_all)
                proposed = propose(logits, temperature, uniforms)
            answers.append(torch.stack([values.float() for values in proposed]))
        # fp32 holds ids below 2**24 exactly
        out: Floats = torch.cat(answers, dim=1).cpu().numpy()
        return out

    def _past(self, batch: _Batch, offset: Tensor) -> tuple[PooledPast, int]:
        longest = int(batch.start.max())
        if len(batch.start) == 1:
            first = int(batch.offset[0])
            return PooledPast(self._pool.store, slice(first, first + longest)), longest
        return PooledPast(self._pool.store, self._pool.places(offset, longest)), longest

    def _to_device(self, arrays: list[Ints]) -> list[Tensor]:
        packed = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
        flat = torch.split(packed.to(self._device), [array.size for array in arrays])
        return [part.view(array.shape) for part, array in zip(flat, arrays, strict=True)]


def load(path: Path, *, device: str = "auto", quantization: str = "auto") -> TorchBackend:
    """Load a model folder (config.json, model.safetensors).

    Args:
        path: the folder; its name names the model.
        device: "auto" picks CUDA when there is one.
        quantization: "auto" (fp32 on a CPU, the checkpoint's dtype on a GPU), "none" and "fp32",
            "bf16", "fp16".

    Raises:
        ModelNotFound, ModelDamaged, UnsupportedModel: see load_checkpoint.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    known = {"none": torch.float32, **DTYPES}
    if quantization != "auto" and quantization not in known:
        allowed = ", ".join(["auto", *known])
        raise UnsupportedModel(f"quantization is {quantization!r} but torch offers {allowed}")
    model = load_checkpoint(path)
    dtype = known.get(quantization)
    if dtype is None:
        stored = model.embed_tokens.weight.dtype
        dtype = torch.float32 if device == "cpu" else stored
    model = model.to(device=device, dtype=dtype)
    return TorchBackend(model, name=path.name, device=device, dtype=dtype)


def _pack(rows: Sequence[StepRow], spans: Sequence[Span], info: ModelInfo) -> _Batch:
    """Lay the rows out as padded arrays."""
    lengths = [num_forwarded(row.window, info) for row in rows]
    shape = (len(rows), max(lengths))
    tokens = np.zeros(shape, dtype=np.int64)
    start = np.array([row.window.start for row in rows], dtype=np.int64)
    # Padded rows see the whole window, so that no softmax is empty; nobody sees them.
    visible = np.repeat((start + shape[1])[:, None], shape[1], axis=1)
    masks: list[list[int]] = []
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ids = row.window.tokens
        tokens[index, :length] = ids[:length]
        visible[index, :length] = row.window.visible_until()[:length]
        masks.append([i for i, token in enumerate(ids) if token == info.mask_id])
    mask_rows = np.repeat(np.arange(len(rows)), [len(positions) for positions in masks])
    mask_columns = np.array(list(chain.from_iterable(masks)), dtype=np.int64)
    head_rows = mask_rows * shape[1] + mask_columns
    if info.shift_logits:  # position 0 is predicted by the slot's last cached state
        head_rows = np.where(mask_columns == 0, mask_rows, len(rows) + head_rows - 1)
    stored = list(_stored(rows, spans, shape[1]))
    return _Batch(
        tokens=tokens,
        visible=visible,
        start=start,
        offset=np.array([span.offset for span in spans], dtype=np.int64),
        slot_index=np.array([span.index for span in spans], dtype=np.int64),
        masks=masks,
        head_rows=head_rows,
        store_from=ranges([(first, num) for first, _, num, _ in stored]),
        store_to=ranges([(place, num) for _, place, num, _ in stored]),
        last_from=np.array([first + num - 1 for first, _, num, _ in stored], dtype=np.int64),
        last_to=np.array([index for _, _, _, index in stored], dtype=np.int64),
    )


def _stored(
    rows: Sequence[StepRow], spans: Sequence[Span], width: int
) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first flattened row, pool place, length, slot index), once for each storing slot."""
    seen: set[Slot] = set()
    for index, (row, span) in enumerate(zip(rows, spans, strict=True)):
        if row.window.num_to_cache and row.slot not in seen:
            seen.add(row.slot)
            place = span.offset + row.window.start
            yield index * width, place, row.window.num_to_cache, span.index


def _sampling(rows: Sequence[StepRow], masks: list[list[int]]) -> tuple[Floats | None, bool]:
    """Return [3, N] temperature, top_p and uniforms (None where all is greedy); any nucleus?"""
    if not any(row.temperature > 0 for row in rows):
        return None, False
    values = [
        (row.temperature, row.top_p, row.uniforms[i] if row.uniforms else 0.0)
        for row, positions in zip(rows, masks, strict=True)
        for i in positions
    ]
    nucleus = any(row.temperature > 0 and row.top_p < 1 for row in rows)
    return np.array(values, dtype=np.float32).reshape(-1, 3).T.copy(), nucleus


def _model_info(config: TransformerConfig, name: str, device: str, dtype: torch.dtype) -> ModelInfo:
    quantization = {value: key for key, value in DTYPES.items()}[dtype]
    return ModelInfo(
        name=name,
        family=config.family,
        mask_id=config.mask_id,
        eos_ids=config.eos_ids,
        shift_logits=config.shift_logits,
        prompt_attention=config.prompt_attention,
        native_block_size=config.native_block_size,
        max_block_size=config.max_block_size,
        max_len=config.max_len,
        vocab_size=config.num_tokens,
        kv_bytes_per_token=config.kv_bytes_per_token * dtype.itemsize // 4,
        device=device,
        quantization=quantization,
    )
