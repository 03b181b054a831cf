"""Choice: how a model runs on a device with torch: how its weights are stored, and which step.

The one place that decides either. The checkpoint's own numbers come first: nothing is quantised
that fits as it is, since every quantisation changes answers (bench/fast-step.md has by how much).
The kernels of the fast step lean on parts of Triton that change from one version to the next, and
compilers differ by GPU: what they were run with is known; anywhere else they must pass a trial.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from d2f_runtime.models.config import TransformerConfig
from d2f_stream.core.errors import UnsupportedModel

if TYPE_CHECKING:
    import torch

__all__ = [
    "QUANTIZATIONS",
    "Choice",
    "DeviceFacts",
    "choose_quantization",
    "choose_runner",
    "is_proven",
    "weight_bytes",
]

QUANTIZATIONS: Final = ("fp32", "bf16", "fp16", "fp8", "int8", "nf4")
LOW_BIT: Final = ("int8", "nf4")

OLDEST: Final = (8, 0)  # bf16 in the matrix units
OLDEST_FP8: Final = (8, 9)
PROVEN: Final = frozenset({((3, 6), 9)})  # version of Triton, generation of the GPU

RESERVE: Final = 3 << 29  # bytes for activations, graphs and the library's own, 1.5 GiB
TOKENS: Final = 4096  # of K/V that must fit beside the weights, where the model holds so many
BITS: Final = {"fp32": 32.0, "bf16": 16.0, "fp16": 16.0, "fp8": 8.0, "int8": 8.0, "nf4": 4.25}


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen, and a clause that says why, for people."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What decides how models run on a device.

    Attributes:
        capability: compute capability of a CUDA device; None is a CPU.
        has_triton: whether Triton can be imported.
        free: bytes of the device's memory; None is unknown and bounds nothing.
        fault_of: what is wrong with the kernels for a quantization, with experts or without, as a
            clause; empty where nothing is. May take seconds.
    """

    capability: tuple[int, int] | None = None
    has_triton: bool = False
    free: int | None = None
    fault_of: Callable[[str, bool], str] = lambda *_: ""

    @classmethod
    def of(cls, device: "torch.device") -> Self:
        """Return the facts of one of torch's devices."""
        if device.type != "cuda":
            return cls()
        import torch

        from d2f_runtime.kernels.language import HAS_TRITON, TRITON_VERSION

        capability = torch.cuda.get_device_capability(device)

        def fault_of(quantization: str, has_experts: bool) -> str:
            if is_proven(TRITON_VERSION, capability):
                return ""
            from d2f_runtime.backends.kernel_trial import fault_of_trial  # with all kernels

            if quantization != "fp8" and not (has_experts and quantization == "nf4"):
                quantization = "bf16"
            return fault_of_trial(device, quantization, has_experts)

        return cls(capability, HAS_TRITON, torch.cuda.mem_get_info(device)[0], fault_of)


def choose_runner(
    device: DeviceFacts,
    *,
    quantization: str,
    head_dim: int = 128,
    has_experts: bool = False,
    wanted: str = "auto",
) -> Choice:
    """Choose how steps run: "fast" or "plain".

    Args:
        device: where they run.
        quantization: one of QUANTIZATIONS.
        head_dim: of the model.
        has_experts: whether the model is a mixture of experts.
        wanted: "auto", or "fast" or "plain" to insist.

    Raises:
        UnsupportedModel: what is wanted, or the step that the quantization needs, cannot be had.
    """
    if wanted == "fast" and device.capability is None:
        return Choice("fast", "asked for")  # for tests: the same code over the kernels' references
    obstacle = _obstacle(device, quantization, head_dim, has_experts)
    if wanted == "fast":
        if obstacle:
            raise UnsupportedModel(f"the fast step was asked for, but {obstacle}")
        return Choice("fast", "asked for")
    if wanted == "plain":
        obstacle = "the plain step was asked for"
    elif not obstacle and quantization == "fp32":
        obstacle = "the weights are fp32"
    if not obstacle:
        return Choice("fast", "a CUDA device with Triton")
    if quantization == "fp8":
        raise UnsupportedModel(f"fp8 needs the fast step, but {obstacle}; use bf16 or fp32")
    if quantization in LOW_BIT:
        whose = "experts as they are chosen" if has_experts else "weights dequantised"
        obstacle += f"; it multiplies {quantization} {whose}"
    return Choice("plain", obstacle)


def choose_quantization(config: TransformerConfig, device: DeviceFacts, *, stored: str) -> Choice:
    """Choose how a model's weights are stored on a device, where nobody says.

    In this order, the first that fits: as the checkpoint has them, bf16, fp8 (where the GPU has
    it), nf4. int8 is never chosen: fp8 takes the same memory and less time, nf4 half of it.

    Args:
        config: of the model.
        device: that holds them.
        stored: how the checkpoint has them, one of QUANTIZATIONS; another name, such as Q4_K, is
            not kept.
    """
    lost = "" if stored in QUANTIZATIONS else f"; the file's {stored} is dequantised"
    if device.capability is None:
        if stored in LOW_BIT:
            return Choice(stored, "the checkpoint's own, dequantised to fp32 on a CPU")
        return Choice("fp32", f"a CPU computes in fp32{lost}")
    if stored in LOW_BIT:
        return Choice(stored, "the checkpoint's own")

    def runs(quantization: str) -> bool:
        """Whether it is of use: on the plain step, fp8 is none, and nf4 of experts alone."""
        has_experts = config.mixture is not None
        needs_kernels = quantization == "fp8" or (quantization == "nf4" and not has_experts)
        if not needs_kernels:
            return True
        return not _obstacle(device, quantization, config.head_dim, has_experts)

    too_large = ""
    kept = "bf16" if lost else stored
    for name in dict.fromkeys((kept, "bf16", "fp8", "nf4")):
        needed = _needed(config, name)
        if not runs(name):
            continue
        if device.free is None or needed <= device.free:
            why = "the checkpoint's own, which fits" if name == stored else "fits"
            return Choice(name, f"{why}{_room(needed, device.free)}{too_large}{lost}")
        too_large += f"; {name} would need {_gib(needed)}"
    name = "nf4" if runs("nf4") else kept
    return Choice(name, f"the least memory, though none fits{too_large}{lost}")


def is_proven(triton_version: str, capability: tuple[int, int]) -> bool:
    """Whether the kernels are known to work with this Triton on GPUs of this generation."""
    numbers = triton_version.split(".")[:2]
    if not all(number.isdecimal() for number in numbers):
        return False
    return (tuple(map(int, numbers)), capability[0]) in PROVEN


def weight_bytes(config: TransformerConfig, quantization: str) -> int:
    """Return the bytes of a model's weights; the ends keep 16 bits, save the head of fp8."""
    size, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
    attention = size * config.head_dim * 2 * (heads + kv_heads)
    layers = config.num_layers * attention + _feed_forward(config)
    table = config.vocab_size * size
    wide = 4 if quantization == "fp32" else 2
    ends = table * (1 if config.tie_embeddings else 2) * wide
    if quantization == "fp8" and config.vocab_size % 16 == 0:
        ends = table * 3  # an embedding of 16 bits and, tied or not, a head of 8
    return int(layers * BITS[quantization] / 8) + ends


def _feed_forward(config: TransformerConfig) -> int:
    """Return the weights of all layers' feed-forwards."""
    mixture, size, num_dense = config.mixture, config.hidden_size, config.num_layers
    if mixture is None:
        return num_dense * 3 * size * config.ffn_size
    num_dense = sum(mixture.is_dense(layer) for layer in range(config.num_layers))
    experts = mixture.num_parameters(size, config.num_layers)
    return num_dense * 3 * size * config.ffn_size + experts


def _obstacle(device: DeviceFacts, quantization: str, head_dim: int, has_experts: bool) -> str:
    """Return what stands in the way of the kernels; empty where nothing does."""
    oldest = OLDEST_FP8 if quantization == "fp8" else OLDEST
    if device.capability is None:
        return "there is no CUDA device"
    if not device.has_triton:
        return "triton is not installed"
    if device.capability < oldest:
        found, least = (".".join(map(str, numbers)) for numbers in (device.capability, oldest))
        return f"the GPU is of compute capability {found}, not {least}"
    if head_dim & (head_dim - 1) or not 16 <= head_dim <= 128:
        return f"the model's head size {head_dim} is no power of two from 16 to 128"
    if has_experts and quantization == "int8":
        return "it holds no experts in int8"
    return device.fault_of(quantization, has_experts)


def _needed(config: TransformerConfig, quantization: str) -> int:
    """Return the bytes that a model needs: loaded, or while it is, which may be more.

    Weights of 4 bits are quantised as they come; those of fp8 are all there in 16 bits, and are
    packed layer by layer.
    """
    loaded = weight_bytes(config, quantization) + _beside(config, quantization)
    if quantization != "fp8":
        return loaded
    layer = weight_bytes(config, "fp8") // config.num_layers
    return max(loaded, weight_bytes(config, "bf16") + layer)


def _beside(config: TransformerConfig, quantization: str) -> int:
    """Return the bytes that a model needs besides its weights."""
    per_token = config.kv_bytes_per_token // (1 if quantization == "fp32" else 2)
    return RESERVE + per_token * min(TOKENS, config.max_len)


def _room(needed: int, free: int | None) -> str:
    return "" if free is None else f" ({_gib(needed)} with K/V, of {_gib(free)} free)"


def _gib(number: int) -> str:
    return f"{number / 2**30:.1f} GiB"
