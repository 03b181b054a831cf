"""Which runner a device gets: the fast one or the plain one, and why. Plain Python, no torch.

The kernels lean on parts of Triton that change from one version to the next, and compilers differ
by GPU. What they were run with is known; anywhere else they must pass a check first.
"""

from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["RunnerChoice", "choose_runner", "is_proven"]

OLDEST: Final = (8, 0)  # bf16 in the matrix units
OLDEST_FP8: Final = (8, 9)
PROVEN: Final = frozenset({((3, 6), 9)})  # version of Triton, generation of the GPU
LOW_BIT: Final = ("int8", "nf4")


@dataclass(frozen=True, slots=True)
class RunnerChoice:
    """A runner and a clause that says why it was chosen, for people; no name is a refusal."""

    name: Literal["fast", "plain"] | None
    reason: str


def is_proven(triton_version: str, compute_capability: tuple[int, int]) -> bool:
    """Whether the kernels are known to work with this Triton on GPUs of this generation."""
    numbers = triton_version.split(".")[:2]
    if not all(number.isdecimal() for number in numbers):
        return False
    return (tuple(map(int, numbers)), compute_capability[0]) in PROVEN


def choose_runner(
    *,
    device: str,
    compute_capability: tuple[int, int] | None,
    has_triton: bool,
    quantization: str,
    head_dim: int = 128,
    fault: str = "",
    wanted: str = "auto",
) -> RunnerChoice:
    """Choose how the torch backend runs its steps.

    Args:
        device: "cpu" or "cuda".
        compute_capability: of a CUDA device.
        has_triton: whether Triton can be imported.
        quantization: "fp32", "bf16", "fp16", "fp8", "int8" or "nf4".
        head_dim: of the model.
        fault: what a check of the kernels found; empty where it found nothing or was not needed.
        wanted: "auto", or "fast" or "plain" to insist.
    """
    if quantization == "fp8" and wanted != "fast":
        obstacle = _obstacle(device, compute_capability, has_triton, head_dim, fault)
        if not obstacle and compute_capability is not None and compute_capability < OLDEST_FP8:
            obstacle = f"the GPU is of compute capability {_dotted(compute_capability)}, not 8.9"
        if obstacle or wanted == "plain":
            why = obstacle or "the plain step was asked for"
            return RunnerChoice(None, f"fp8 needs the fast step, but {why}; use bf16 or fp32")
        return RunnerChoice("fast", "a CUDA device with Triton")
    if quantization in LOW_BIT and wanted != "fast":
        obstacle = _obstacle(device, compute_capability, has_triton, head_dim, fault)
        if obstacle or wanted == "plain":
            why = obstacle or "it was asked for"
            return RunnerChoice("plain", f"{why}; it multiplies {quantization} weights dequantised")
        return RunnerChoice("fast", "a CUDA device with Triton")
    if wanted == "plain":
        return RunnerChoice("plain", "asked for")
    if wanted == "fast":
        if device == "cpu":  # for tests: the same code over the kernels' references
            return RunnerChoice("fast", "asked for")
        obstacle = _obstacle(device, compute_capability, has_triton, head_dim, fault)
        if obstacle:
            return RunnerChoice(None, f"the fast step was asked for, but {obstacle}")
        return RunnerChoice("fast", "asked for")
    obstacle = _obstacle(device, compute_capability, has_triton, head_dim, fault)
    if not obstacle and quantization == "fp32":
        obstacle = "the weights are fp32"
    if obstacle:
        return RunnerChoice("plain", obstacle)
    return RunnerChoice("fast", "a CUDA device with Triton")


def _obstacle(
    device: str,
    compute_capability: tuple[int, int] | None,
    has_triton: bool,
    head_dim: int,
    fault: str,
) -> str:
    """Return what stands in the way of the kernels; empty where nothing does."""
    if device != "cuda" or compute_capability is None:
        return "there is no CUDA device"
    if not has_triton:
        return "triton is not installed"
    if compute_capability < OLDEST:
        return f"the GPU is of compute capability {_dotted(compute_capability)}, not 8.0"
    if head_dim & (head_dim - 1) or not 16 <= head_dim <= 128:
        return f"the model's head size {head_dim} is no power of two from 16 to 128"
    return fault


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
