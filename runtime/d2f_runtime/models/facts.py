"""ModelInfo: what the decoder and the engine must know of a model, whoever runs it. Pure values."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["FAMILIES", "CommitAttention", "ModelInfo", "PromptAttention"]

FAMILIES = ("a2d", "dream", "fast_dllm_v2", "llada", "llama", "qwen2", "qwen3", "scripted", "sdar")
"""The kinds of model that folders may name; "scripted" has no transformer."""

PromptAttention = Literal["full", "causal", "grid"]
CommitAttention = Literal["block", "causal"]


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
        commit_attention: how a block's rows attend when its K/V are cached: "block" as they did
            before, "causal" each position like the autoregressive model that this one is made of.
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
    commit_attention: CommitAttention = "block"
