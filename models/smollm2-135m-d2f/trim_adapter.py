"""Trim a draft adapter to fit the package: rank 32, and 64 where that keeps most for its bytes.

    python models/smollm2-135m-d2f/trim_adapter.py ADAPTER OUTPUT 2.0

The last argument is what ranks beyond 32 may take in the exported graph, MB. Ranks are multiples of
32, the block of its 4-bit weights.
"""

import json
import sys
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

NARROW: Final = 32
BYTES_PER_WEIGHT: Final = 4.5 / 8
Factors = tuple[Tensor, Tensor, Tensor]  # [in, r], [out, r] orthonormal, [r] descending


def decomposed(inner: Tensor, outer: Tensor) -> Factors:
    """Return the singular value decomposition of outer @ inner: [out, r] and [r, in]."""
    left, left_rest = torch.linalg.qr(outer.double())
    right, right_rest = torch.linalg.qr(inner.double().T)
    u, values, vh = torch.linalg.svd(left_rest @ right_rest.T)
    return right @ vh.T, left @ u, values


def widest(products: dict[str, Factors], budget: float) -> set[str]:
    """Return the products that keep their rank, the best for their bytes first."""

    def weights(name: str) -> int:
        inner, outer, values = products[name]
        return (len(values) - NARROW) * (len(inner) + len(outer))

    def gain(name: str) -> float:
        return float((products[name][2][NARROW:] ** 2).sum()) / weights(name)

    kept: set[str] = set()
    for name in sorted(products, key=gain, reverse=True):
        size = weights(name) * BYTES_PER_WEIGHT
        if size <= budget:
            budget -= size
            kept.add(name)
    return kept


def trim(source: Path, target: Path, budget: float) -> None:
    """Write the trimmed adapter, whose kept products are as they were."""
    tensors = load_file(source / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text())
    outer_of = {name: name.replace("lora_A", "lora_B") for name in tensors if "lora_A" in name}
    products = {name: decomposed(tensors[name], tensors[outer_of[name]]) for name in outer_of}
    wide = widest(products, budget)
    scale = config["lora_alpha"] / config["r"]
    for name, (inner, outer, values) in products.items():
        rank = len(values) if name in wide else NARROW
        root, dtype = values[:rank].sqrt(), tensors[name].dtype
        tensors[name] = (inner[:, :rank] * root).T.contiguous().to(dtype)
        tensors[outer_of[name]] = (outer[:, :rank] * root).contiguous().to(dtype)
    modules = {name[name.index("layers.") : name.index(".lora_A")]: name for name in sorted(wide)}
    config["rank_pattern"] = {module: len(products[name][2]) for module, name in modules.items()}
    config["alpha_pattern"] = {m: scale * rank for m, rank in config["rank_pattern"].items()}
    config |= {"r": NARROW, "lora_alpha": scale * NARROW}
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    trim(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]) * 1e6)
