"""TorchBackend: a `Transformer` that runs with torch on a CPU or one GPU.

Owns the weights and the K/V of all slots; how the rows of a step run is a runner's: the fast one
where the device allows it, else the plain one.
"""

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal

import torch

from d2f_runtime.backends.base import Slot, StepRow
from d2f_runtime.backends.buckets import CROWD_TOKENS, sessions_beside
from d2f_runtime.backends.choice import (
    QUANTIZATIONS,
    DeviceFacts,
    choose_quantization,
    choose_runner,
)
from d2f_runtime.backends.devices import check_device
from d2f_runtime.backends.kv_pool import KVPool, free_bytes, pool_tokens
from d2f_runtime.backends.plain_runner import PlainRunner
from d2f_runtime.backends.rows import MAX_BRANCH_MASKS, broken_rows, check_rows, to_proposals
from d2f_runtime.backends.runner import Runner
from d2f_runtime.decoding.window import Proposals
from d2f_runtime.models.checkpoints import load_checkpoint, stored_as
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.facts import ModelInfo
from d2f_runtime.models.transformer import Transformer
from d2f_runtime.quantization.stored import LOW_BIT, dequantise_layers
from d2f_stream.core.errors import UnsupportedModel
from d2f_stream.core.params import GenerationParams

__all__ = ["DTYPES", "QUANTIZED", "TorchBackend", "load"]

GPU_SPARE_ROWS: Final = 2048  # of SmolLM2-135M on an H200, see docs/distillation.md

logger = logging.getLogger("d2f_stream.torch_backend")

DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Quantized = Literal["fp8", "int8", "nf4"]
QUANTIZED: Final[dict[str, Quantized]] = {"fp8": "fp8", "int8": "int8", "nf4": "nf4"}


class TorchBackend:
    """Implements Backend with torch.

    Args:
        model: weights; shared where they already have `device` and `dtype`, else copied.
        name: for people.
        device: "cpu", "cuda" or "cuda:0".
        dtype: of weights and K/V; the head's softmax is fp32.
        quantization: of the layers' products: "fp8" (a GPU's fast step only), "nf4", "int8" (the
            plain step multiplies what is left of them, dequantised); None for `dtype`.
        max_tokens: K/V places over all slots, which bound `info.max_len`; None goes by the memory
            that is free, see `pool_tokens`.
        runner: "auto" is the fast one where the device allows it.
        graphs: the fast step is captured never ("off"), or per shape when it first occurs ("lazy").
        consume: take `model` apart while packing it, which bounds the memory; it is unusable then.

    Raises:
        UnsupportedModel: the runner or the quantization is not for this device.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        name: str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        quantization: Quantized | None = None,
        max_tokens: int | None = None,
        runner: Literal["auto", "fast", "plain"] = "auto",
        graphs: Literal["off", "lazy"] = "lazy",
        consume: bool = False,
    ) -> None:
        config = model.config
        self._device = torch.device(device)
        weight = model.embed_tokens.weight
        if weight.device.type != self._device.type or weight.dtype != dtype:
            model = copy.deepcopy(model).to(device=self._device, dtype=dtype)
            consume = True
        named = {value: key for key, value in DTYPES.items()}[dtype]
        info = _model_info(config, name, str(self._device), dtype, quantization or named)
        self.choice = choose_runner(
            DeviceFacts.of(self._device),
            quantization=quantization or named,
            head_dim=config.head_dim,
            has_experts=config.mixture is not None,
            wanted=runner,
        )
        if max_tokens is None:
            free = free_bytes(self._device)
            crowd = CROWD_TOKENS if self._device.type == "cuda" else 0
            size = info.kv_bytes_per_token
            max_tokens = pool_tokens(config.max_len, size, free, crowd=crowd)
            if max_tokens < config.max_len:
                logger.warning(
                    "%s holds K/V of %s tokens, not of its %s positions: that is half of the %.1f "
                    "GiB of memory that are free; kv_tokens= of load() chooses another number",
                    *(name, max_tokens, config.max_len, (free or 0) / 2**30),
                )
        info = replace(info, max_len=min(config.max_len, max_tokens))
        if self.choice.name == "fast":
            info = replace(info, step_sessions=sessions_beside(max_tokens))
        self.info = info
        scratch = MAX_BRANCH_MASKS if info.branches and self.choice.name == "fast" else 0
        self._pool = KVPool(config, max_tokens, self._device, dtype, num_scratch=scratch)
        self._runner: Runner | None
        if self.choice.name == "fast":
            from d2f_runtime.backends.fast_runner import FastRunner
            from d2f_runtime.models.fast_transformer import KERNELS, REFERENCES, FastTransformer

            ops = KERNELS if self._device.type == "cuda" else REFERENCES
            with torch.inference_mode():
                packed = FastTransformer(
                    model,
                    quantization=quantization or named,
                    ops=ops,
                    consume=consume,
                    max_len=self.info.max_len,
                )
                del model
                self._runner = FastRunner(packed, self._pool, self.info, use_graphs=graphs != "off")
        else:
            if quantization in LOW_BIT:
                model = model if consume else copy.deepcopy(model)
                dequantise_layers(model.layers, quantization, dtype)
            self._runner = PlainRunner(model, self._pool, self.info)

    def check(self, params: GenerationParams) -> None:
        """Accept every setting: sampling is complete here."""

    def warm_up(self) -> None:
        """Compile the kernels and capture the shapes of one session; the log says what it took."""
        assert self._runner is not None, "the backend is closed"
        self._runner.warm_up()

    @torch.inference_mode()
    def open_slot(self, capacity: int) -> Slot:
        """Reserve K/V storage for `capacity` tokens.

        Raises:
            OutOfCapacity: the pool has no span that long, or all slots are open.
        """
        return self._pool.open(capacity)

    def step(self, rows: Sequence[StepRow]) -> list[Proposals]:
        """Run one forward for all rows, in order; cache the first `num_to_cache` of each."""
        if not rows:
            return []
        spans = [self._pool[row.slot] for row in rows]
        check_rows(rows, spans)
        assert self._runner is not None, "the backend is closed"
        masks, answers = self._runner.run(rows, spans)
        if broken := broken_rows(masks, answers):
            self._pool.blank([spans[index] for index in broken])
        for row, span in zip(rows, spans, strict=True):
            span.num_cached = row.window.start + row.window.num_to_cache
        return to_proposals(rows, masks, answers)

    @torch.inference_mode()
    def copy_prefix(self, source: Slot, target: Slot, num_tokens: int) -> None:
        """Store in `target`, which holds nothing yet, what `source` holds for its first tokens."""
        self._pool.copy(source, target, num_tokens)

    def close_slot(self, slot: Slot) -> None:
        """Free the slot's storage. Idempotent."""
        self._pool.close(slot)

    def close(self) -> None:
        """Free the weights and the pool. Idempotent; slots may still be closed."""
        self._runner = None
        self._pool.clear()


def load(
    path: Path,
    *,
    device: str = "auto",
    quantization: str = "auto",
    adapter: Path | None = None,
    kv_tokens: int | None = None,
    family: str | None = None,
) -> TorchBackend:
    """Load a model folder (config.json, model.safetensors) or a GGUF file, tensor by tensor.

    Args:
        path: of the folder or the file; its name names the model.
        device: "auto" picks CUDA when there is one.
        quantization: "none" and "fp32", "bf16", "fp16", "fp8", "int8", "nf4"; "auto" goes by the
            device and its memory, see `choose_quantization`, and the log says why.
        adapter: folder of a LoRA adapter to merge into the weights, or for the drafts alone.
        kv_tokens: K/V places over all slots; None goes by the memory that is free.
        family: which it is, where its files do not tell; see `family_of`.

    Raises:
        ModelNotFound, ModelDamaged, UnsupportedModel: see load_checkpoint.
    """
    check_device(device, backend="torch")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if quantization not in ("auto", "none", *QUANTIZATIONS):
        allowed = ", ".join(["auto", "none", *QUANTIZATIONS])
        raise UnsupportedModel(f"quantization is {quantization!r} but torch offers {allowed}")
    chosen = "fp32" if quantization == "none" else quantization
    if quantization == "auto":
        stored = stored_as(path, family=family)
        choice = choose_quantization(
            stored.config,
            DeviceFacts.of(torch.device(device)),
            stored=stored.quantization,
        )
        logger.info("%s takes its weights as %s: %s", path.name, choice.name, choice.reason)
        chosen = choice.name
    dtype = DTYPES.get(chosen, torch.bfloat16)
    if chosen in LOW_BIT and device == "cpu":
        dtype = torch.float32
    model = load_checkpoint(
        path,
        adapter=adapter,
        family=family,
        device=device,
        dtype=dtype,
        quantization=chosen if chosen in LOW_BIT else None,
    )
    return TorchBackend(
        model,
        name=path.name,
        device=device,
        dtype=model.embed_tokens.weight.dtype,
        quantization=QUANTIZED.get(chosen),
        max_tokens=kv_tokens,
        consume=True,
    )


def _model_info(
    config: TransformerConfig, name: str, device: str, dtype: torch.dtype, quantization: str
) -> ModelInfo:
    facts = config.facts
    if device.startswith("cuda"):
        facts |= {"spare_rows": GPU_SPARE_ROWS}
    return ModelInfo(
        **facts,
        branches=config.commit_attention == "causal" and not config.drafts_in_place,
        name=name,
        kv_bytes_per_token=config.kv_bytes_per_token * dtype.itemsize // 4,
        device=device,
        quantization=quantization,
    )
