"""Which runner a device gets: the fast one or the plain one, and why. Plain Python, no torch."""

from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["RunnerChoice", "choose_runner"]

OLDEST: Final = (8, 0)  # bf16 in the matrix units
OLDEST_FP8: Final = (8, 9)


@dataclass(frozen=True, slots=True)
class RunnerChoice:
    """A runner and a clause that says why it was chosen, for people; no name is a refusal."""

    name: Literal["fast", "plain"] | None
    reason: str


def choose_runner(
    *,
    device: str,
    compute_capability: tuple[int, int] | None,
    has_triton: bool,
    quantization: str,
    head_dim: int = 128,
    wanted: str = "auto",
) -> RunnerChoice:
    """Choose how the torch backend runs its steps.

    Args:
        device: "cpu" or "cuda".
        compute_capability: of a CUDA device.
        has_triton: whether Triton can be imported.
        quantization: "fp32", "bf16", "fp16" or "fp8".
        head_dim: of the model.
        wanted: "auto", or "fast" or "plain" to insist.
    """
    if quantization == "fp8" and wanted != "fast":
        obstacle = _obstacle(device, compute_capability, has_triton, head_dim)
        if not obstacle and compute_capability is not None and compute_capability < OLDEST_FP8:
            obstacle = f"the GPU is of compute capability {_dotted(compute_capability)}, not 8.9"
        if obstacle or wanted == "plain":
            why = obstacle or "the plain step was asked for"
            return RunnerChoice(None, f"fp8 needs the fast step, but {why}; use bf16 or fp32")
        return RunnerChoice("fast", "a CUDA device with Triton")
    if wanted == "plain":
        return RunnerChoice("plain", "asked for")
    if wanted == "fast":
        if device == "cpu":  # for tests: the same code over the kernels' references
            return RunnerChoice("fast", "asked for")
        obstacle = _obstacle(device, compute_capability, has_triton, head_dim)
        if obstacle:
            return RunnerChoice(None, f"the fast step was asked for, but {obstacle}")
        return RunnerChoice("fast", "asked for")
    obstacle = _obstacle(device, compute_capability, has_triton, head_dim)
    if not obstacle and quantization == "fp32":
        obstacle = "the weights are fp32"
    if obstacle:
        return RunnerChoice("plain", obstacle)
    return RunnerChoice("fast", "a CUDA device with Triton")


def _obstacle(
    device: str, compute_capability: tuple[int, int] | None, has_triton: bool, head_dim: int
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
    return ""


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
