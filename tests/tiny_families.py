"""The published families with tiny sizes: their config files, special tokens and chat templates.

The keys are those of the published config.json files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FAMILIES", "LLADA_TEMPLATE", "QWEN_TEMPLATE", "Tiny"]

QWEN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLADA_TEMPLATE = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Tiny:
    """A family's published files, with tiny sizes.

    Attributes:
        model_type: of config.json.
        classes: prefix of transformers' classes that compute the same.
        config: config.json; token ids are added when it is written.
        mask: text of the mask token.
        ends: texts that must end an answer; the first is the config's eos_token_id.
        tokens: further added tokens.
        template: chat template.
        attention: "full", "causal", "prompt_grid" or the size of the grid.
        parts: vocab.json and merges.txt instead of tokenizer.json.
    """

    model_type: str
    classes: str
    config: Mapping[str, Any]
    mask: str | None
    ends: tuple[str, ...]
    attention: str | int
    tokens: tuple[str, ...] = ("<|im_start|>",)
    template: str = QWEN_TEMPLATE
    parts: bool = False
    shifted: bool = True
    generation: Mapping[str, Any] = field(default_factory=dict)


_QWEN = {
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "max_window_layers": 2,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 320,
}
_ENDS = ("<|endoftext|>", "<|im_end|>")

_LLADA2 = Tiny(
    model_type="llada2_moe",
    classes="LLaDA2",
    config={
        "architectures": ["LLaDA2MoeModelLM"],
        "attention_dropout": 0.0,
        "block_size": 8,  # the published ones have 32 and do not say so
        "embedding_dropout": 0.0,
        "first_k_dense_replace": 1,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "max_position_embeddings": 512,
        "max_window_layers": 28,
        "model_type": "llada2_moe",
        "moe_intermediate_size": 24,
        "moe_router_enable_expert_bias": True,
        "n_group": 4,
        "norm_head": False,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts": 16,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "num_shared_experts": 1,
        "output_dropout": 0.0,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 600000,
        "rotary_dim": 16,
        "routed_scaling_factor": 2.5,
        "router_dtype": "fp32",
        "score_function": "sigmoid",
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "topk_group": 2,
        "use_bias": False,
        "use_cache": False,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_sliding_window": False,
        "vocab_size": 320,
    },
    mask="<|mask|>",
    ends=("<|endoftext|>", "<|role_end|>"),
    attention=8,
    tokens=("<|startoftext|>",),
    shifted=False,
)

FAMILIES: Mapping[str, Tiny] = {
    "llada": Tiny(
        model_type="llada",
        classes="Llama",
        config={
            "activation_type": "silu",
            "alibi": False,
            "alibi_bias_max": 8.0,
            "architectures": ["LLaDAModelLM"],
            "attention_dropout": 0.0,
            "attention_layer_norm": False,
            "attention_layer_norm_with_affine": True,
            "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"},
            "bias_for_layer_norm": False,
            "block_group_size": 1,
            "block_type": "llama",
            "d_model": 64,
            "embedding_dropout": 0.0,
            "embedding_size": 320,
            "flash_attention": False,
            "include_bias": False,
            "include_qkv_bias": False,
            "init_device": "meta",
            "input_emb_norm": False,
            "layer_norm_type": "rms",
            "layer_norm_with_affine": True,
            "max_sequence_length": 256,
            "mlp_hidden_size": 96,
            "mlp_ratio": 4,
            "model_type": "llada",
            "multi_query_attention": None,
            "n_heads": 4,
            "n_kv_heads": 4,
            "n_layers": 2,
            "precision": "amp_bf16",
            "rms_norm_eps": 1e-05,
            "rope": True,
            "rope_full_precision": True,
            "rope_theta": 500000.0,
            "scale_logits": False,
            "vocab_size": 320,
            "weight_tying": False,
        },
        mask="<|mdm_mask|>",
        ends=("<|endoftext|>", "<|eot_id|>"),
        attention="full",
        tokens=("<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>"),
        template=LLADA_TEMPLATE,
        shifted=False,
    ),
    "Dream": Tiny(
        model_type="Dream",
        classes="Qwen2",
        config=_QWEN
        | {
            "architectures": ["DreamModel"],
            "auto_map": {"AutoModel": "modeling_dream.DreamModel"},
            "model_type": "Dream",
            "use_mrope": False,
        },
        mask="<|mask|>",
        ends=_ENDS,
        attention="full",
        tokens=("<|im_start|>", "<|beginoftext|>"),
        parts=True,
    ),
    "sdar": Tiny(
        model_type="sdar",
        classes="Qwen3",
        config=_QWEN
        | {
            "architectures": ["SDARForCausalLM"],
            "attention_bias": False,
            "block_size": 4,
            "debug": False,
            "fuse_cross_entropy": True,
            "head_dim": 32,
            "model_type": "sdar",
        },
        mask="<|MASK|>",
        ends=_ENDS,
        attention=4,
        shifted=False,
    ),
    "sdar_moe": Tiny(
        model_type="sdar_moe",
        classes="Qwen3Moe",
        config=_QWEN
        | {
            "architectures": ["SDARMoeForCausalLM"],
            "attention_bias": False,
            "block_size": 4,
            "decoder_sparse_step": 1,
            "head_dim": 32,
            "mlp_only_layers": [],
            "model_type": "sdar_moe",
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "num_experts": 8,
            "num_experts_per_tok": 3,
        },
        mask="<|MASK|>",
        ends=_ENDS,
        attention=4,
        shifted=False,
    ),
    "llada2_moe": _LLADA2,
    "nemotron_labs_diffusion": Tiny(
        model_type="nemotron_labs_diffusion",
        classes="Ministral3",
        config={
            "ar_loss_weight": 1.0,
            "architectures": ["NemotronLabsDiffusionModel"],
            "attention_bias": False,
            "attn_implementation": "sdpa",
            "block_size": 8,
            "bos_token_id": 1,
            "dlm_loss_weight": None,
            "dlm_paradigm": "bidirectional",
            "dp_varying_mask_ratio": False,
            "head_dim": 32,
            "hidden_act": "silu",
            "hidden_size": 64,
            "intermediate_size": 96,
            "max_position_embeddings": 512,
            "mlp_bias": False,
            "model_type": "nemotron_labs_diffusion",
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 16.0,
                "llama_4_scaling_beta": 0.1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 12,
                "rope_theta": 1000000.0,
                "rope_type": "yarn",
            },
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": False,
            "vocab_size": 320,
        },
        mask="<SPECIAL_100>",
        ends=("<SPECIAL_11>",),
        attention="causal",
        tokens=("<s>",),
    ),
    "stable-diffcoder": Tiny(
        model_type="stable-diffcoder",
        classes="Llama",
        config={
            "architectures": ["StableDiffcoderForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.1,
            "auto_map": {
                "AutoModelForCausalLM": "modeling_stable_diffcoder.StableDiffcoderForCausalLM"
            },
            "bos_token_id": 0,
            "head_dim": 16,
            "hidden_act": "silu",
            "hidden_size": 64,
            "intermediate_size": 96,
            "max_position_embeddings": 512,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "resid_pdrop": 0.1,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 320,
        },
        mask="<[MASK]>",
        ends=("<[end▁of▁sentence]>",),
        attention=4,
        shifted=False,
        tokens=("<[begin▁of▁sentence]>",),
    ),
    "a2d-qwen3": Tiny(
        model_type="a2d-qwen3",
        classes="Qwen3",
        config=_QWEN
        | {
            "architectures": ["A2DQwen3LMHeadModel"],
            "attention_bias": False,
            "auto_map": {
                "AutoConfig": "modeling_qwen3.A2DQwen3Config",
                "AutoModelForMaskedLM": "modeling_qwen3.A2DQwen3LMHeadModel",
            },
            "head_dim": 32,
            "layer_types": ["full_attention", "full_attention"],
            "model_type": "a2d-qwen3",
            "tie_word_embeddings": True,
        },
        mask="<|mask|>",
        ends=_ENDS,
        attention="prompt_grid",
        shifted=False,
    ),
    "a2d-qwen2": Tiny(
        model_type="a2d-qwen2",
        classes="Qwen2",
        config=_QWEN
        | {
            "architectures": ["A2DQwen2LMHeadModel"],
            "auto_map": {"AutoModelForMaskedLM": "modeling_qwen2.A2DQwen2LMHeadModel"},
            "model_type": "a2d-qwen2",
        },
        mask="<|MASK|>",
        ends=_ENDS,
        attention="prompt_grid",
        shifted=False,
    ),
    "Fast_dLLM_Qwen": Tiny(
        model_type="Fast_dLLM_Qwen",
        classes="Qwen2",
        config=_QWEN
        | {
            "architectures": ["Fast_dLLM_QwenForCausalLM"],
            "bd_size": 8,
            "model_type": "Fast_dLLM_Qwen",
            "tie_word_embeddings": True,
        },
        mask="|<MASK>|",
        ends=_ENDS,
        attention=8,
    ),
    "llama": Tiny(
        model_type="llama",
        classes="Llama",
        config={
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "hidden_size": 64,
            "intermediate_size": 96,
            "max_position_embeddings": 512,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 64,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
        },  # without a vocab_size: it has no padded rows
        mask=None,
        ends=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        attention="causal",
        tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
        template=LLADA_TEMPLATE,
    ),
    "qwen2": Tiny(
        model_type="qwen2",
        classes="Qwen2",
        config=_QWEN | {"model_type": "qwen2", "tie_word_embeddings": True},
        mask=None,
        ends=_ENDS,
        attention="causal",
    ),
    "qwen3": Tiny(
        model_type="qwen3",
        classes="Qwen3",
        config=_QWEN | {"attention_bias": False, "head_dim": 32, "model_type": "qwen3"},
        mask=None,
        ends=_ENDS,
        attention="causal",
    ),
}
