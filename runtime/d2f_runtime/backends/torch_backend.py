"""Runs a `Transformer` with torch on a CPU or one GPU.

Owns the weights and the K/V of all slots; how the rows of a step run is a runner's: the fast one
where the device allows it, else the plain one.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import torch

from d2f_runtime.backends.base import ModelInfo, Slot, StepRow
from d2f_runtime.backends.capability import RunnerChoice, choose_runner
from d2f_runtime.backends.kv_pool import KVPool
from d2f_runtime.backends.plain_runner import PlainRunner
from d2f_runtime.backends.rows import check_row, to_proposals
from d2f_runtime.backends.runner import Runner
from d2f_runtime.kernels.language import HAS_TRITON
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.transformer import Transformer
from d2f_runtime.window import Proposals
from d2f_stream.errors import UnsupportedModel
from d2f_stream.params import GenerationParams

__all__ = ["DTYPES", "TorchBackend", "load"]

DEFAULT_POOL_BYTES: Final = 1 << 30
NUM_SCRATCH: Final = 256  # places for the windows of lookahead branches

DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchBackend:
    """Implements Backend with torch.

    Args:
        model: weights; shared where they already have `device` and `dtype`, else copied.
        name: for people.
        device: "cpu", "cuda" or "cuda:0".
        dtype: of weights and K/V; the head's softmax is fp32.
        quantization: "fp8" for the layers' products (a GPU's fast step only); None for `dtype`.
        max_tokens: K/V places over all slots; None takes what fits in 1 GiB, at least max_len.
        runner: "auto" is the fast one where the device allows it.
        graphs: the fast step is captured: never ("off"), per shape when it first occurs ("lazy"),
            or for all shapes of one session here ("warm").
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
        quantization: Literal["fp8"] | None = None,
        max_tokens: int | None = None,
        runner: Literal["auto", "fast", "plain"] = "auto",
        graphs: Literal["off", "lazy", "warm"] = "lazy",
        consume: bool = False,
    ) -> None:
        config = model.config
        self._device = torch.device(device)
        weight = model.embed_tokens.weight
        if weight.device.type != self._device.type or weight.dtype != dtype:
            model = copy.deepcopy(model).to(device=self._device, dtype=dtype)
            consume = True
        named = {value: key for key, value in DTYPES.items()}[dtype]
        self.info = _model_info(config, name, str(self._device), dtype, quantization or named)
        self.choice = _choose(config, self._device, quantization or named, runner)
        if max_tokens is None:
            fitting = DEFAULT_POOL_BYTES // self.info.kv_bytes_per_token
            max_tokens = max(config.max_len, fitting)
        num_scratch = NUM_SCRATCH if self.choice.name == "fast" else 0
        self._pool = KVPool(config, max_tokens, self._device, dtype, num_scratch=num_scratch)
        self._runner: Runner | None
        if self.choice.name == "fast":
            from d2f_runtime.backends.fast_runner import FastRunner
            from d2f_runtime.models.fast_transformer import KERNELS, REFERENCES, FastTransformer

            ops = KERNELS if self._device.type == "cuda" else REFERENCES
            with torch.inference_mode():
                packed = FastTransformer(
                    model, quantization=quantization or named, ops=ops, consume=consume
                )
                del model
                fast = FastRunner(packed, self._pool, self.info, use_graphs=graphs != "off")
                if graphs == "warm":
                    fast.warm_up()
            self._runner = fast
        else:
            self._runner = PlainRunner(model, self._pool, self.info)

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
        assert self._runner is not None, "the backend is closed"
        masks, answers = self._runner.run(rows, spans)
        for row, span in zip(rows, spans, strict=True):
            span.num_cached = row.window.start + row.window.num_to_cache
        return to_proposals(rows, masks, answers)

    def close_slot(self, slot: Slot) -> None:
        """Free the slot's storage. Idempotent."""
        self._pool.close(slot)

    def close(self) -> None:
        """Free the weights and the pool. Idempotent; slots may still be closed."""
        self._runner = None
        self._pool.clear()


def load(
    path: Path, *, device: str = "auto", quantization: str = "auto", adapter: Path | None = None
) -> TorchBackend:
    """Load a model folder (config.json, model.safetensors), tensor by tensor onto the device.

    Args:
        path: the folder; its name names the model.
        device: "auto" picks CUDA when there is one.
        quantization: "auto" (fp32 on a CPU, the checkpoint's dtype on a GPU), "none" and "fp32",
            "bf16", "fp16", "fp8".
        adapter: folder of a LoRA adapter to merge into the weights.

    Raises:
        ModelNotFound, ModelDamaged, UnsupportedModel: see load_checkpoint.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    known = {"none": torch.float32, **DTYPES, "fp8": torch.bfloat16}
    if quantization != "auto" and quantization not in known:
        allowed = ", ".join(["auto", *known])
        raise UnsupportedModel(f"quantization is {quantization!r} but torch offers {allowed}")
    dtype = known.get(quantization)
    if dtype is None and device == "cpu":
        dtype = torch.float32
    model = load_checkpoint(path, adapter=adapter, device=device, dtype=dtype)
    return TorchBackend(
        model,
        name=path.name,
        device=device,
        dtype=model.embed_tokens.weight.dtype,
        quantization="fp8" if quantization == "fp8" else None,
        consume=True,
    )


def _choose(
    config: TransformerConfig, device: torch.device, quantization: str, runner: str
) -> RunnerChoice:
    is_cuda = device.type == "cuda"
    choice = choose_runner(
        device=device.type,
        compute_capability=torch.cuda.get_device_capability(device) if is_cuda else None,
        has_triton=HAS_TRITON,
        quantization=quantization,
        head_dim=config.head_dim,
        wanted=runner,
    )
    if choice.name is None:
        raise UnsupportedModel(choice.reason)
    return choice


def _model_info(
    config: TransformerConfig, name: str, device: str, dtype: torch.dtype, quantization: str
) -> ModelInfo:
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
