"""Tiny random GGUF files, written with gguf-py's own writer in the layouts that llama.cpp makes.

Names, keys and the order of q's and k's rows are those of llama.cpp's convert_hf_to_gguf.py,
written down apart from the code that reads them.
"""

import json
import random
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from torch import Tensor

__all__ = [
    "CONTROL",
    "DEFINED",
    "K_TYPES",
    "TEMPLATE",
    "TYPES",
    "oracle",
    "random_blocks",
    "random_text",
    "tokens_of",
    "vocabulary",
    "write_gguf",
    "write_tokens",
]

TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # gguf-py can make these
K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")  # and only read these

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over 13 lazy dogs, doesn't it? I'll say: they've won 1,234.50.",
    "def add(a, b):\n\treturn a + b  # sum\r\n\r\n    print(add(1, 2))",
    "Größe, naïve café, Straße; 中文字符与 русский текст и العربية 🙂🙃 ½ Ⅷ ²",
]
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")
DEFINED = ("<think>", "</think>")

HEAD_DIMS = {"llama": 64, "qwen2": 64, "qwen3": 128}  # transformers takes qwen3's for granted
SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where the blocks of 256 hold fp16 scales, bytes; all else may be anything."""


@cache
def vocabulary() -> tuple[list[str], list[str]]:
    """Return the tokens by id, added ones last, and the merges of a small byte-level BPE."""
    import tokenizers

    tokens = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokens.train_from_iterator(CORPUS * 3, trainer)
    model = json.loads(tokens.to_str())["model"]
    texts = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return [*texts, *CONTROL, *DEFINED], [" ".join(pair) for pair in model["merges"]]


def tokens_of(*texts: str) -> list[int]:
    """Return the ids of tokens."""
    tokens, _ = vocabulary()
    return [tokens.index(text) for text in texts]


def oracle(architecture: str, *, tied: bool = False, seed: int = 0, **changes: Any) -> Any:
    """Return transformers' model with random weights of some size, so that logits spread."""
    import transformers

    prefix = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[architecture]
    settings: dict[str, Any] = {
        **SIZES,
        "head_dim": HEAD_DIMS[architecture],
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "vocab_size": len(vocabulary()[0]),
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "tie_word_embeddings": tied,
        "attn_implementation": "eager",
    }
    config = getattr(transformers, f"{prefix}Config")(**(settings | changes))
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else 0.1 * noise)
    return model


def write_gguf(
    path: Path,
    architecture: str,
    model: Any,
    *,
    stored: str = "F32",
    pre: str | None = "gpt-2",
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    unused: int = 0,
) -> Path:
    """Write a model of transformers as llama.cpp's converter does.

    Args:
        path: of the file.
        architecture: llama, qwen2 or qwen3.
        model: of transformers.
        stored: type of the matrices; the blocks of K types are random, not the model's.
        pre: name of the pre-tokenizer; None leaves it out.
        metadata: keys to add or replace; None as a value leaves one out.
        tensors: to add or replace, by the file's names.
        unused: rows of the embedding beyond the tokens, which must be in the model.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in _metadata(architecture, model.config, pre, metadata or {}, unused).items():
        _add(writer, key, value)
    weights = {
        _name(name): _paired(name, weight, model.config) if architecture == "llama" else weight
        for name, weight in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }
    for index, (name, weight) in enumerate((weights | dict(tensors or {})).items()):
        array = weight.detach().float().contiguous().numpy()
        kind = gguf.GGMLQuantizationType[stored if array.ndim > 1 else "F32"]
        if kind.name in K_TYPES:
            packed = random_blocks(kind.name, array.shape, seed=index)
        else:
            packed = array if kind.name == "F32" else quantize(array, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    _finish(writer)
    return path


def write_tokens(
    path: Path,
    *,
    pre: str | None = "gpt-2",
    metadata: Mapping[str, Any] | None = None,
    unused: int = 0,
) -> Path:
    """Write a file that holds a tokenizer and one tensor; arguments as of `write_gguf`."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (_tokens(pre, unused) | dict(metadata or {})).items():
        if value is not None:
            _add(writer, key, value)
    writer.add_tensor("token_embd.weight", np.ones((2, 32), dtype=np.float32))
    _finish(writer)
    return path


def random_blocks(stored: str, shape: Sequence[int], *, seed: int) -> np.ndarray[Any, Any]:
    """Return [rows, bytes] of blocks of a K type with random bits and small scales."""
    kind = gguf.GGMLQuantizationType[stored]
    length, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (shape[0], shape[1] // length, num_bytes), dtype=np.uint8)
    spread = {"Q2_K": 3e-3, "Q3_K": 3e-3, "Q4_K": 2e-4, "Q5_K": 1e-4, "Q6_K": 1e-4}[stored]
    for start in HALVES[stored]:
        scales = rng.uniform(0.2, 1.0, blocks.shape[:2]).astype(np.float16) * np.float16(spread)
        blocks[:, :, start : start + 2] = scales[:, :, None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(name: str) -> str:
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module, _, leaf = name.rpartition(".")
    if module in top:
        return f"{top[module]}.{leaf}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{MODULES[inner]}.{leaf}"


def _paired(name: str, weight: Tensor, config: Any) -> Tensor:
    """Order the rows of q and k in pairs: LlamaModel.permute of the converter."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    module = name.split(".")[-2]
    if module not in heads:
        return weight
    shape = weight.shape
    halves = weight.reshape(heads[module], 2, shape[0] // heads[module] // 2, *shape[1:])
    return halves.transpose(1, 2).reshape(shape)


def _metadata(
    architecture: str, config: Any, pre: str | None, changes: Mapping[str, Any], unused: int
) -> dict[str, Any]:
    values = {
        "general.name": "Tiny",
        f"{architecture}.block_count": config.num_hidden_layers,
        f"{architecture}.context_length": config.max_position_embeddings,
        f"{architecture}.embedding_length": config.hidden_size,
        f"{architecture}.feed_forward_length": config.intermediate_size,
        f"{architecture}.attention.head_count": config.num_attention_heads,
        f"{architecture}.attention.head_count_kv": config.num_key_value_heads,
        f"{architecture}.attention.key_length": config.head_dim,
        f"{architecture}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{architecture}.rope.freq_base": config.rope_parameters["rope_theta"],
        f"{architecture}.rope.dimension_count": config.head_dim,
    }
    values |= _tokens(pre, unused) | dict(changes)
    return {key: value for key, value in values.items() if value is not None}


def _tokens(pre: str | None, unused: int) -> dict[str, Any]:
    tokens, merges = vocabulary()
    types = [3 if text in CONTROL else 4 if text in DEFINED else 1 for text in tokens]
    end, bos = tokens_of("<|im_end|>", "<|endoftext|>")
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, *(f"[PAD{len(tokens) + i}]" for i in range(unused))],
        "tokenizer.ggml.token_type": types + [5] * unused,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": bos,
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.padding_token_id": bos,
        "tokenizer.chat_template": TEMPLATE,
    }
    return {key: value for key, value in values.items() if value is not None}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint64(key, value) if value >= 1 << 32 else writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def random_text(rng: random.Random) -> str:
    """Return a text of words, code, specials, whitespace and characters from all over Unicode."""
    pieces = []
    for _ in range(rng.randrange(1, 12)):
        match rng.randrange(7):
            case 0 | 1:
                line = rng.choice(CORPUS)
                start = rng.randrange(len(line))
                pieces.append(line[start : start + rng.randrange(1, 12)])
            case 2:
                pieces.append(rng.choice([*CONTROL, *DEFINED]))
            case 3:
                blank = [
                    " ",
                    "  ",
                    "   ",
                    "\n",
                    " \n\n ",
                    "\t",
                    "\r\n",
                    "\u00a0",
                    "\u3000",
                    "\u2028",
                ]
                pieces.append(rng.choice(blank))
            case 4:
                pieces.append(
                    rng.choice(["'s", "'LL", "'re", "'", "007", "1234567", "+=", "$", "^^"])
                )
            case 5:
                code = rng.choice([range(32, 127), range(0xA0, 0x250), range(0x300, 0x370)])
                pieces.append(chr(rng.choice(code)))
            case _:
                pieces.append(chr(rng.choice([*range(0x4E00, 0x4E80), *range(0x1F600, 0x1F640)])))
    return "".join(pieces)
