"""Tiny random checkpoints in the layouts in which the models of the field are published.

The weights come from transformers' own classes, whose names are the published ones for all families
but LLaDA; LLaDA's names stand here, written down apart from the code that reads them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llada2_oracle import LLaDA2
from tiny_families import FAMILIES, Tiny

__all__ = [
    "FAMILIES",
    "Tiny",
    "added_tokens",
    "additive",
    "block_causal",
    "config_of",
    "oracle",
    "published",
    "published_weights",
    "stack_experts",
    "write_adapter",
    "write_checkpoint",
    "write_model",
    "write_tokenizer",
    "write_weights",
]

WITHOUT_MASK_ID = (
    "Fast_dLLM_Qwen",
    "a2d-qwen2",
    "a2d-qwen3",
    "llada2_moe",
    "stable-diffcoder",
)  # in their config.json
TEXT = "Ann has 3 apples and buys 4 more. How many apples has she now? She has 3 + 4 = 7 apples."

LLADA_NAMES = [
    (r"model\.embed_tokens\.", "model.transformer.wte."),
    (r"model\.norm\.", "model.transformer.ln_f."),
    (r"lm_head\.", "model.transformer.ff_out."),
    (r"model\.layers\.(\d+)\.input_layernorm\.", r"model.transformer.blocks.\1.attn_norm."),
    (r"model\.layers\.(\d+)\.post_attention_layernorm\.", r"model.transformer.blocks.\1.ff_norm."),
    (r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.", r"model.transformer.blocks.\1.\2_proj."),
    (r"model\.layers\.(\d+)\.self_attn\.o_proj\.", r"model.transformer.blocks.\1.attn_out."),
    (r"model\.layers\.(\d+)\.mlp\.gate_proj\.", r"model.transformer.blocks.\1.ff_proj."),
    (r"model\.layers\.(\d+)\.mlp\.up_proj\.", r"model.transformer.blocks.\1.up_proj."),
    (r"model\.layers\.(\d+)\.mlp\.down_proj\.", r"model.transformer.blocks.\1.ff_out."),
]


def added_tokens(tiny: Tiny) -> dict[str, int]:
    """Return the added tokens with their ids, behind the vocabulary."""
    vocab, _ = _byte_pairs(290)
    texts = [*tiny.ends, *tiny.tokens, *([tiny.mask] if tiny.mask else [])]
    return {text: len(vocab) + index for index, text in enumerate(texts)}


def config_of(tiny: Tiny, **changes: Any) -> dict[str, Any]:
    """Return config.json, ids included."""
    ids = added_tokens(tiny)
    config = dict(tiny.config)
    config.setdefault("vocab_size", max(ids.values()) + 1)
    config["eos_token_id"] = ids[tiny.ends[0]]
    if tiny.mask is not None and tiny.model_type not in WITHOUT_MASK_ID:
        config["mask_token_id"] = ids[tiny.mask]
    return {key: value for key, value in (config | changes).items() if value is not ...}


def oracle(tiny: Tiny, seed: int = 0, **changes: Any) -> Any:
    """Return transformers' model with random weights of some size, so that logits spread."""
    import transformers

    config = config_of(tiny, **changes)
    if tiny.model_type == "llada":
        config = {
            "hidden_size": config["d_model"],
            "intermediate_size": config["mlp_hidden_size"],
            "num_attention_heads": config["n_heads"],
            "num_key_value_heads": config["n_kv_heads"],
            "num_hidden_layers": config["n_layers"],
            "max_position_embeddings": config["max_sequence_length"],
            "vocab_size": config["embedding_size"],
            "rms_norm_eps": config["rms_norm_eps"],
            "rope_theta": config["rope_theta"],
            "tie_word_embeddings": config["weight_tying"],
        }
    if tiny.classes == "LLaDA2":
        return _drawn(LLaDA2(config).eval(), seed)
    kept = {k: v for k, v in config.items() if k not in ("architectures", "auto_map", "model_type")}
    kept |= {"torch_dtype": "float32", "attn_implementation": "eager"}
    settings = getattr(transformers, f"{tiny.classes}Config")(**kept)
    return _drawn(getattr(transformers, f"{tiny.classes}ForCausalLM")(settings).eval(), seed)


def _drawn(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.dim() == 1 and not name.endswith("expert_bias")
            parameter.copy_(1 + 0.1 * noise if is_norm else 0.1 * noise)
    return model


def block_causal(length: int, stops: Sequence[int]) -> Tensor:
    """Return [length, length] bool: a row sees everything before the end of its own block."""
    until = torch.tensor([min(stop for stop in stops if stop > i) for i in range(length)])
    return torch.arange(length)[None, :] < until[:, None]


def additive(visible: Tensor) -> Tensor:
    """Return a [rows, columns] mask as transformers' eager attention takes it."""
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]


def published_weights(tiny: Tiny, model: Any) -> dict[str, Tensor]:
    """Return the model's tensors under the names of the family's checkpoints."""
    weights: dict[str, Tensor] = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    if tiny.classes == "Qwen3Moe":
        weights = _by_expert(weights)
    return {published(tiny, name): tensor.contiguous() for name, tensor in weights.items()}


def _by_expert(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return each expert's matrices by themselves, which transformers stacks and joins."""
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        stem, _, part = name.rpartition(".")
        if part == "gate_up_proj":
            for expert, joined in enumerate(weight):
                gate, up = joined.chunk(2)
                found[f"{stem}.{expert}.gate_proj.weight"] = gate
                found[f"{stem}.{expert}.up_proj.weight"] = up
        elif part == "down_proj":
            found |= {f"{stem}.{expert}.{part}.weight": down for expert, down in enumerate(weight)}
        else:
            found[name] = weight
    return found


def stack_experts(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the layout of the training repository: a layer's experts in one tensor."""
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        stem, inside, rest = name.partition(".mlp.experts.")
        if not inside:
            found[name] = weight
            continue
        number, part, _ = rest.split(".")
        key = f"{stem}.mlp.experts.{part}"
        found[key] = torch.cat([found[key], weight[None]]) if number != "0" else weight[None]
    return found


def published(tiny: Tiny, name: str) -> str:
    """Return the family's name of one of transformers' tensors or modules."""
    if tiny.model_type == "nemotron_labs_diffusion":
        return re.sub("^model", "encoder", re.sub("^lm_head", "diffusion_head", name))
    if tiny.model_type != "llada":
        return name
    for pattern, replacement in LLADA_NAMES:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    raise AssertionError(name)


def write_weights(folder: Path, weights: Mapping[str, Tensor], *, num_shards: int = 1) -> None:
    """Write model.safetensors, or shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    if num_shards == 1:
        save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for index in range(num_shards):
        file = f"model-{index + 1:05}-of-{num_shards:05}.safetensors"
        held = names[index::num_shards]
        save_file({n: weights[n] for n in held}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    total = sum(t.numel() * t.element_size() for t in weights.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))


def write_tokenizer(folder: Path, tiny: Tiny) -> None:
    """Write the tokenizer's files, special tokens and chat template included."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = _byte_pairs(290)
    added = added_tokens(tiny)
    config: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": tiny.ends[0],
        "chat_template": tiny.template,
        "added_tokens_decoder": {
            str(token): {"content": text, "special": True, "normalized": False}
            for text, token in added.items()
        },
    }
    if tiny.mask is not None:
        config["mask_token"] = tiny.mask
    if tiny.tokens[0].startswith("<|start") or tiny.tokens[0].startswith("<|begin"):
        config["bos_token"] = {"content": tiny.tokens[0]}
    if tiny.parts:
        config["tokenizer_class"] = "DreamTokenizer"
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n")
        (folder / "added_tokens.json").write_text(json.dumps(added))
    else:
        _byte_level(vocab, merges, list(added)).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_checkpoint(
    folder: Path, tiny: Tiny, model: Any, *, num_shards: int = 1, **changes: Any
) -> None:
    """Write everything that the family's repositories hold, with the weights of `model`."""
    write_tokenizer(folder, tiny)
    if tiny.model_type != "llada":
        changes["tie_word_embeddings"] = model.config.tie_word_embeddings
    (folder / "config.json").write_text(json.dumps(config_of(tiny, **changes)))
    ids = added_tokens(tiny)
    generation = {"eos_token_id": ids[tiny.ends[0]], **tiny.generation}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    write_weights(folder, published_weights(tiny, model), num_shards=num_shards)


def write_model(folder: Path, model_type: str, *, seed: int = 0, num_shards: int = 1) -> Any:
    """Write a random checkpoint of a family; return transformers' model with its weights."""
    model = oracle(FAMILIES[model_type], seed)
    write_checkpoint(folder, FAMILIES[model_type], model, num_shards=num_shards)
    return model


def write_adapter(
    folder: Path, tiny: Tiny, state: Mapping[str, Tensor], *, seed: int = 1, rank: int = 4
) -> None:
    """Write a LoRA on q, k, v and o, named as the published D2F ones, and merge it into `state`.

    The config is that of the published ones but for the rank: alpha equals it.

    Args:
        folder: gets adapter_config.json and adapter_model.safetensors.
        tiny: the base's family.
        state: the base's weights by transformers' names; changed in place.
        seed: of the factors.
        rank: of the factors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    targets: set[str] = set()
    for name, weight in state.items():
        if not re.search(
            r"(self_attn\.[qkvo]_proj|attention\.(query_key_value|dense))\.weight", name
        ):
            continue
        module = published(tiny, name).removesuffix(".weight")
        targets.add(module.rpartition(".")[2])
        down = torch.randn(rank, weight.shape[1], generator=generator) * 0.2
        up = torch.randn(weight.shape[0], rank, generator=generator) * 0.2
        weights[f"base_model.model.{module}.lora_A.weight"] = down
        weights[f"base_model.model.{module}.lora_B.weight"] = up
        with torch.no_grad():
            weight += up @ down
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "base_model_name_or_path": "org/base",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted(targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


@cache
def _byte_pairs(size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and the merges of a small byte-level BPE."""
    import tokenizers

    tokens = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokens.train_from_iterator([TEXT] * 3, trainer)
    model = json.loads(tokens.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _byte_level(vocab: dict[str, int], merges: list[tuple[str, str]], added: list[str]) -> Any:
    import tokenizers

    tokens = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = tokenizers.decoders.ByteLevel()
    tokens.add_special_tokens(added)
    return tokens
