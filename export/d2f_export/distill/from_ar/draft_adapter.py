"""The draft adapter: low-rank factors on every product of the layers, and what a mask is to them.

Stored in PEFT's layout under the base's own module names, with the mask's embedding beside the
factors and a block "d2f" in the config that says what the adapter is.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from d2f_export.distill.from_ar.settings import DraftSettings
from d2f_export.distill.from_ar.streams import AdapterLayer
from d2f_export.distill.whole_files import write_peft
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.draft_facts import DraftFacts
from d2f_stream.core.errors import InvalidRequest

__all__ = [
    "MASK_EMBEDDING",
    "StoredAdapter",
    "adapter_layers",
    "check_start",
    "new_adapter",
    "read_adapter",
    "write_adapter",
]

MASK_EMBEDDING: Final = "mask_embedding"
_MODULES: Final = {  # of each product: its module, and the joined A with its place in it
    "q": ("self_attn.q_proj", "qkv_a", 0),
    "k": ("self_attn.k_proj", "qkv_a", 1),
    "v": ("self_attn.v_proj", "qkv_a", 2),
    "out": ("self_attn.o_proj", "out_a", 0),
    "gate": ("mlp.gate_proj", "gate_up_a", 0),
    "up": ("mlp.up_proj", "gate_up_a", 1),
    "down": ("mlp.down_proj", "down_a", 0),
}


def new_adapter(
    config: TransformerConfig, *, rank: int, seed: int, table: Tensor
) -> dict[str, Tensor]:
    """Return fresh factors, with which a draft computes what the base does; fp32, on the CPU.

    Args:
        config: of the base.
        rank: of every product.
        seed: of the draw.
        table: [V, D] embedding; a mask begins as the mean of its rows.
    """
    random = torch.Generator().manual_seed(seed)
    size, ffn = config.hidden_size, config.ffn_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def down(count: int, width: int) -> Tensor:
        drawn = torch.randn(count * rank, width, generator=random)
        return drawn / math.sqrt(width)

    factors: dict[str, Tensor] = {}
    for index in range(config.num_layers):
        layer = AdapterLayer(
            qkv_a=down(3, size),
            q_b=torch.zeros(queries, rank),
            k_b=torch.zeros(keys, rank),
            v_b=torch.zeros(keys, rank),
            out_a=down(1, queries),
            out_b=torch.zeros(size, rank),
            gate_up_a=down(2, size),
            gate_b=torch.zeros(ffn, rank),
            up_b=torch.zeros(ffn, rank),
            down_a=down(1, ffn),
            down_b=torch.zeros(size, rank),
        )
        factors |= {f"{index}.{name}": value for name, value in layer._asdict().items()}
    factors[MASK_EMBEDDING] = table.float().mean(dim=0).cpu()
    return factors


def adapter_layers(factors: Mapping[str, Tensor], num_layers: int) -> list[AdapterLayer]:
    """Return the factors layer by layer."""
    return [
        AdapterLayer(*(factors[f"{index}.{name}"] for name in AdapterLayer._fields))
        for index in range(num_layers)
    ]


def write_adapter(
    folder: Path, factors: Mapping[str, Tensor], *, rank: int, base: str, about: Mapping[str, Any]
) -> None:
    """Write adapter_config.json and adapter_model.safetensors, bf16; the config last.

    Args:
        folder: made where needed; files of these names are replaced whole.
        factors: of `new_adapter`, trained.
        rank: of the factors.
        base: the name of the base.
        about: the block "d2f": kind, mask_id, block_sizes, base.
    """
    stored = {MASK_EMBEDDING: factors[MASK_EMBEDDING]}
    num_layers = sum(name.endswith(".qkv_a") for name in factors)
    for index in range(num_layers):
        for name, (module, joined, place) in _MODULES.items():
            prefix = f"base_model.model.model.layers.{index}.{module}"
            first = place * rank
            a = factors[f"{index}.{joined}"][first : first + rank]
            stored[f"{prefix}.lora_A.weight"] = a
            stored[f"{prefix}.lora_B.weight"] = factors[f"{index}.{name}_b"]
    tensors = {
        name: value.detach().to("cpu", torch.bfloat16).contiguous().clone()
        for name, value in stored.items()
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(module.rpartition(".")[2] for module, _, _ in _MODULES.values()),
        "d2f": dict(about),
    }
    write_peft(folder, tensors, config)


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """A draft adapter as `write_adapter` wrote it.

    Attributes:
        folder: where it was read.
        factors: of `new_adapter`'s names, fp32.
        rank: of every product, the highest that was stored.
        facts: mask and block sizes.
        mask_id: of the mask.
        base_sha256: of the base's file; None where its writer did not say.
    """

    folder: Path
    factors: dict[str, Tensor]
    rank: int
    facts: DraftFacts
    mask_id: int
    base_sha256: str | None


def read_adapter(folder: Path, config: TransformerConfig) -> StoredAdapter:
    """Read what `write_adapter` wrote, the factors joined again.

    Products of a trimmed adapter have several ranks. The smaller ones are filled up with zeros,
    which stay zeros in a training: neither factor has a gradient where the other one is 0.

    Raises:
        InvalidRequest: the folder holds no draft adapter, or one of a model of another shape.
    """
    try:
        facts = DraftFacts.read(folder)
        if facts is None or facts.mask_id is None:
            raise InvalidRequest(
                f"{folder} holds no draft adapter (its adapter_config.json has no 'd2f'); give a "
                "folder that distill --from-ar wrote"
            )
        stored = load_file(folder / "adapter_model.safetensors")
        about = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        rank = max(int(about["r"]), *about.get("rank_pattern", {}).values(), 0)
        factors = {MASK_EMBEDDING: stored[MASK_EMBEDDING].float()}
        for index in range(config.num_layers):
            joined: dict[str, list[Tensor]] = {}
            for name, (module, joined_name, _) in _MODULES.items():
                prefix = f"base_model.model.model.layers.{index}.{module}"
                inner = stored[f"{prefix}.lora_A.weight"].float()
                missing = rank - len(inner)
                joined.setdefault(joined_name, []).append(F.pad(inner, (0, 0, 0, missing)))
                outer = stored[f"{prefix}.lora_B.weight"].float()
                factors[f"{index}.{name}_b"] = F.pad(outer, (0, missing))
            factors |= {f"{index}.{name}": torch.cat(parts) for name, parts in joined.items()}
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise InvalidRequest(f"{folder} is no draft adapter that can be read: {error}") from error
    base = about["d2f"].get("base")
    digest = base.get("sha256") if isinstance(base, dict) else None
    return StoredAdapter(folder, factors, rank, facts, facts.mask_id, digest)


def check_start(adapter: StoredAdapter, settings: DraftSettings, base_sha256: str | None) -> None:
    """Refuse to begin with an adapter of another base, mask or rank.

    Raises:
        InvalidRequest: it does not fit.
    """
    if None not in (adapter.base_sha256, base_sha256) and adapter.base_sha256 != base_sha256:
        raise InvalidRequest(
            f"{adapter.folder} was trained for weights with the digest {adapter.base_sha256}, but "
            f"those of {settings.from_ar} have {base_sha256}; give the base that it was made of"
        )
    for name, own, wanted in (
        ("rank", adapter.rank, settings.rank),
        ("mask_id", adapter.mask_id, settings.mask_id),
    ):
        if wanted is not None and own != wanted:
            raise InvalidRequest(
                f"{name} is {wanted}, but {adapter.folder} has {own}; a training that begins with "
                "it keeps that"
            )
