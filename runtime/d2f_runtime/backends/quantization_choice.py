"""How the weights of a model are stored where nobody says so, and why. Plain Python, no torch.

The checkpoint's own numbers come first: nothing is quantised that fits as it is, since every
quantisation changes answers (bench/fast-step.md has by how much).
"""

from dataclasses import dataclass
from typing import Final

from d2f_runtime.backends.capability import choose_runner
from d2f_runtime.models.config import TransformerConfig

__all__ = ["QUANTIZATIONS", "QuantizationChoice", "choose_quantization", "weight_bytes"]

QUANTIZATIONS: Final = ("fp32", "bf16", "fp16", "fp8", "int8", "nf4")

RESERVE: Final = 3 << 29  # bytes for activations, graphs and the library's own, 1.5 GiB
TOKENS: Final = 4096  # of K/V that must fit beside the weights, where the model holds so many
BITS: Final = {"fp32": 32.0, "bf16": 16.0, "fp16": 16.0, "fp8": 8.0, "int8": 8.0, "nf4": 4.25}


@dataclass(frozen=True, slots=True)
class QuantizationChoice:
    """One of QUANTIZATIONS and a clause that says why it was chosen, for people."""

    name: str
    reason: str


def choose_quantization(
    config: TransformerConfig,
    *,
    stored: str,
    device: str,
    compute_capability: tuple[int, int] | None,
    has_triton: bool,
    free: int | None,
) -> QuantizationChoice:
    """Choose how a model's weights are stored on the device.

    In this order, the first that fits: as the checkpoint has them, bf16, fp8 (where the GPU has
    it), nf4. int8 is never chosen: fp8 takes the same memory and less time, nf4 half of it.

    Args:
        config: of the model.
        stored: how the checkpoint has them, one of QUANTIZATIONS.
        device: "cpu" or "cuda".
        compute_capability: of a CUDA device.
        has_triton: whether Triton can be imported.
        free: bytes of the device's memory; None is unknown and bounds nothing.
    """
    if device == "cpu":
        if stored in ("nf4", "int8"):
            return QuantizationChoice(stored, "the checkpoint's own, dequantised to fp32 on a CPU")
        return QuantizationChoice("fp32", "a CPU computes in fp32")
    if stored in ("nf4", "int8"):
        return QuantizationChoice(stored, "the checkpoint's own")

    def runs(quantization: str) -> bool:
        choice = choose_runner(
            device=device,
            compute_capability=compute_capability,
            has_triton=has_triton,
            quantization=quantization,
            head_dim=config.head_dim,
        )
        return choice.name == "fast" or quantization not in ("fp8", "nf4")

    too_large = ""
    for name in dict.fromkeys((stored, "bf16", "fp8", "nf4")):
        if not runs(name):
            continue
        needed = weight_bytes(config, name) + _beside(config, name)
        if free is None or needed <= free:
            why = "the checkpoint's own, which fits" if name == stored else "fits"
            return QuantizationChoice(name, f"{why}{_room(needed, free)}{too_large}")
        too_large += f"; {name} would need {_gib(needed)}"
    name = "nf4" if runs("nf4") else stored
    return QuantizationChoice(name, f"the least memory, though none fits{too_large}")


def weight_bytes(config: TransformerConfig, quantization: str) -> int:
    """Return the bytes of a model's weights; the ends keep 16 bits, save the head of fp8."""
    size, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
    attention = size * config.head_dim * 2 * (heads + kv_heads)
    layers = config.num_layers * (attention + 3 * size * config.ffn_size)
    table = config.vocab_size * size
    wide = 4 if quantization == "fp32" else 2
    ends = table * (1 if config.tie_embeddings else 2) * wide
    if quantization == "fp8" and config.vocab_size % 16 == 0:
        ends = table * 3  # an embedding of 16 bits and, tied or not, a head of 8
    return int(layers * BITS[quantization] / 8) + ends


def _beside(config: TransformerConfig, quantization: str) -> int:
    """Return the bytes that a model needs besides its weights."""
    per_token = config.kv_bytes_per_token // (1 if quantization == "fp32" else 2)
    return RESERVE + per_token * min(TOKENS, config.max_len)


def _room(needed: int, free: int | None) -> str:
    return "" if free is None else f" ({_gib(needed)} with K/V, of {_gib(free)} free)"


def _gib(number: int) -> str:
    return f"{number / 2**30:.1f} GiB"
