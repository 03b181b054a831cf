"""The seam between the engine and whatever runs a model: one step method, no phases.

Prefill and decode are one call: the prompt is block 0, already filled and waiting to be cached.
Backends are blocking and not thread-safe; the engine calls them on one device thread only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NewType, Protocol

from d2f_runtime.window import Proposals, Window
from d2f_stream.params import GenerationParams, Rank

__all__ = ["FAMILIES", "Backend", "ModelInfo", "PromptAttention", "Slot", "StepRow"]

FAMILIES = ("dream", "fast_dllm_v2", "llada", "llama", "qwen2", "qwen3", "scripted", "sdar")
"""The kinds of model that folders may name; "scripted" has no transformer."""

Slot = NewType("Slot", int)
PromptAttention = Literal["full", "causal", "grid"]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the decoder and the engine must know of a loaded model.

    Attributes:
        name: for people and `stream.started`.
        family: "dream", "llada", "sdar", "llama", "scripted", ...
        mask_id: id of the mask token; for autoregressive models any id that is never produced.
        eos_ids: every id that ends an answer.
        shift_logits: True where row i-1 predicts position i (Dream and autoregressive models).
        prompt_attention: "full" is one bidirectional block, "causal" one block per position, "grid"
            blocks on multiples of `native_block_size`.
        native_block_size: what the model was trained for, tokens; 1 for autoregressive models.
        max_block_size: upper bound for a request's block size, tokens.
        max_len: prompt and answer together, tokens.
        vocab_size: number of ids that may be produced; padded rows lie beyond.
        kv_bytes_per_token: K/V storage of one position over all layers.
        device: "cpu", "cuda:0", ...
        quantization: "fp32", "bf16", "int8", ...
        description: what the model can do, for its users; from the manifest.
    """

    name: str
    family: str
    mask_id: int
    eos_ids: tuple[int, ...]
    shift_logits: bool
    prompt_attention: PromptAttention
    native_block_size: int
    max_block_size: int
    max_len: int
    vocab_size: int
    kv_bytes_per_token: int
    device: str
    quantization: str
    description: str = ""


@dataclass(frozen=True, slots=True)
class StepRow:
    """One session's (or one lookahead branch's) part of a step.

    `uniforms` holds one number in [0, 1) per window position for the inverse CDF; None when
    `temperature` is 0. Rows that share a slot have equal `start`, `num_to_cache` and first
    `num_to_cache` tokens.
    """

    slot: Slot
    window: Window
    temperature: float = 0.0
    top_p: float = 1.0
    rank: Rank = "confidence"
    uniforms: Sequence[float] | None = None


class Backend(Protocol):
    """Runs steps of one model on one device."""

    @property
    def info(self) -> ModelInfo:
        """Facts about the loaded model."""
        ...

    def check(self, params: GenerationParams) -> None:
        """Refuse settings that this backend cannot serve, before anything is started.

        Raises:
            InvalidParams: for the first such setting.
        """
        ...

    def warm_up(self) -> None:
        """Do now what the first steps would have to do: compile, capture. Blocks; idempotent."""
        ...

    def open_slot(self, capacity: int, *, prefix: Slot | None = None) -> Slot:
        """Reserve K/V storage for `capacity` tokens, optionally starting as a copy of `prefix`.

        Raises:
            OutOfCapacity: no room for it now.
        """
        ...

    def step(self, rows: Sequence[StepRow]) -> list[Proposals]:
        """Run one forward for all rows, in order; cache the first `num_to_cache` of each."""
        ...

    def close_slot(self, slot: Slot) -> None:
        """Free the slot's storage. Idempotent."""
        ...

    def close(self) -> None:
        """Free the model. Idempotent."""
        ...
