"""Draft adapters with tiny random factors, as folders and as plain tensors."""

import json
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.draft_adapter import DraftAdapter
from d2f_runtime.models.draft_facts import DraftFacts

PRODUCTS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def sizes(config: TransformerConfig, product: str) -> tuple[int, int]:
    """Inputs and outputs of a product."""
    hidden, ffn = config.hidden_size, config.ffn_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "q": (hidden, queries),
        "k": (hidden, keys),
        "v": (hidden, keys),
        "o": (queries, hidden),
        "gate": (hidden, ffn),
        "up": (hidden, ffn),
        "down": (ffn, hidden),
    }[product]


def write_draft_adapter(
    folder: Path,
    config: TransformerConfig,
    *,
    mask_id: int,
    rank: int = 4,
    alpha: int = 8,
    seed: int = 0,
    trained: bool = True,
    prefix: str = "base_model.model.model.",
    products: Collection[str] = tuple(PRODUCTS),
) -> dict[str, Tensor]:
    """Write an adapter and return its tensors; untrained, B is zero as PEFT begins."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"mask_embedding": torch.randn(config.hidden_size, generator=generator) * 0.3}
    for index in range(config.num_layers):
        for product in products:
            name = PRODUCTS[product]
            num_in, num_out = sizes(config, product)
            module = f"{prefix}layers.{index}.{name}"
            down = torch.randn(rank, num_in, generator=generator) * 0.2
            up = torch.randn(num_out, rank, generator=generator) * 0.2
            tensors[f"{module}.lora_A.weight"] = down
            tensors[f"{module}.lora_B.weight"] = up if trained else torch.zeros_like(up)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "base_model_name_or_path": "tiny",
        "target_modules": [name.rpartition(".")[2] for name in PRODUCTS.values()],
        "d2f": {"kind": "draft", "mask_id": mask_id, "block_sizes": [4, 8, 32]},
    }
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return tensors


def draft_adapter(folder: Path, config: TransformerConfig) -> DraftAdapter:
    """Open a folder's adapter."""
    facts = DraftFacts.read(folder)
    assert facts is not None
    return DraftAdapter.open(folder, facts, config)
