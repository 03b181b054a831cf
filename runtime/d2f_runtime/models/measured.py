"""Measured: how much memory models took at most, where a record tells. Pure values.

Each figure is one of a record in bench/, measured with random weights of the model's shape.
"""

from dataclasses import dataclass
from typing import Final

__all__ = ["PEAKS", "Peak", "peak"]


@dataclass(frozen=True, slots=True)
class Peak:
    """The most memory that loading and running a model took.

    Attributes:
        names: of the models that have the shape.
        quantization: of its weights.
        gb: 10^9 bytes.
        device: that it was measured on.
        record: the file that holds the figure.
        keys: where it stands in the file.
    """

    names: tuple[str, ...]
    quantization: str
    gb: float
    device: str
    record: str
    keys: tuple[str, ...]


_MINI: Final = ("llada2.0-mini:16b", "llada2.1-mini:16b")
_H100: Final = "NVIDIA H100 80GB HBM3"
_MIXTURE: Final = "bench/mixture-h200.json"
_LOW_BIT: Final = "bench/step-low-bit-h100.json"

PEAKS: Final = (
    Peak(_MINI, "bf16", 34.38, "NVIDIA H200", _MIXTURE, ("steps bf16", "load_peak_gb")),
    Peak(_MINI, "fp8", 33.58, "NVIDIA H200", _MIXTURE, ("steps fp8", "load_peak_gb")),
    Peak(_MINI, "nf4", 10.81, "NVIDIA H200", _MIXTURE, ("steps nf4", "load_peak_gb")),
    Peak(("fast-dllm-v2:1.5b",), "nf4", 1.7, _H100, _LOW_BIT,
         ("shapes, nf4", "qwen-1.5b", "peak_gb")),
)  # fmt: skip


def peak(name: str, quantization: str) -> Peak | None:
    """Return what was measured of a model; None where nothing was."""
    return next(
        (found for found in PEAKS if name in found.names and found.quantization == quantization),
        None,
    )
