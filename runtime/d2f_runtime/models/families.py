"""The published model families: what their checkpoints have in common, and their tensors' names.

Pure; which family a model is of is `recognition`'s, how its config is read `published_config`'s.
Facts are of the checkpoints as published: their config files, the D2F authors' evaluation code
(zhijie-group/Discrete-Diffusion-Forcing, commit 771f745), JetAstra/SDAR's generate.py and
NVlabs/Fast-dLLM v2's generation_functions.py. Ids follow a folder's own files where these name
them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from d2f_runtime.models.facts import CommitAttention, PromptAttention
from d2f_runtime.models.layouts import Layout

__all__ = ["PUBLISHED", "Family", "Variant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Models of a family that differ where no key of their config says so.

    Attributes:
        named: what their names contain, in lower case.
        prompt_attention, block_size: as in Family; None is the family's.
        defaults: as in Family.
        refused: why this build does not run them; empty where it does.
    """

    named: str
    prompt_attention: PromptAttention | None = None
    block_size: int | None = None
    defaults: str
    refused: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the checkpoints of one `model_type` have in common beyond what their config says.

    Attributes:
        label: of TransformerConfig and ModelInfo.
        layout: names of tensors and of config keys.
        prompt_attention, commit_attention, shift_logits, drafts_in_place: see ModelFacts.
        block_size: what the models were trained for, unless the config names it; tokens.
        variants: that only their names tell.
        mask_token: text of the mask, in either case; None where it is known by its id alone.
        mask_id: published id of the mask; None for autoregressive models.
        eos_tokens: texts and published ids of the tokens that end an answer.
        qkv_bias: biases on q, k and v; None goes by the config.
        qk_norm: RMSNorm on queries and keys.
        head_dim: where the config names none; None shares the hidden size out.
        rope_theta, norm_eps: the same; None where the published code does not agree on it, so that
            the config must name it.
        defaults: the preset of a request that asks for nothing, for the model as it is.
        adapted: the same with a D2F adapter; None where there are none.
    """

    label: str
    layout: Layout = "llama"
    prompt_attention: PromptAttention
    commit_attention: CommitAttention = "block"
    shift_logits: bool
    drafts_in_place: bool = False
    block_size: int
    variants: tuple["Variant", ...] = ()
    mask_token: str | None = None
    mask_id: int | None = None
    eos_tokens: Mapping[str, int]
    qkv_bias: bool | None = None
    qk_norm: bool = False
    head_dim: int | None = None
    rope_theta: float | None = 10_000.0
    norm_eps: float | None = 1e-6
    defaults: str
    adapted: str | None = None

    @property
    def is_autoregressive(self) -> bool:
        """Whether the model knows no mask."""
        return self.mask_id is None


_QWEN_ENDS: Final = {"<|endoftext|>": 151643, "<|im_end|>": 151645}

_A2D_VARIANTS: Final = (
    Variant(named="opdlm", prompt_attention="grid", block_size=4, defaults="opdlm"),
    Variant(named="a2d-init", prompt_attention="grid", block_size=4, defaults="opdlm"),
    Variant(named="bd3lm", defaults="tiny-a2d"),
    Variant(named="mdlm", prompt_attention="full", block_size=32, defaults="llada-vanilla"),
)

PUBLISHED: Final[Mapping[str, Family]] = {
    "llada": Family(  # LLaDA-8B, LLaDA-1.5, d3LLM-LLaDA
        label="llada",
        layout="llada",
        prompt_attention="full",
        shift_logits=False,
        block_size=32,
        mask_token="<|mdm_mask|>",
        mask_id=126336,
        eos_tokens={"<|endoftext|>": 126081, "<|eot_id|>": 126348},
        norm_eps=1e-5,
        defaults="single-block",
        adapted="paper",
    ),
    "Dream": Family(  # Dream-v0, DiffuCoder, d3LLM-Dream
        label="dream",
        prompt_attention="full",
        shift_logits=True,
        block_size=32,
        mask_token="<|mask|>",
        mask_id=151666,
        eos_tokens=_QWEN_ENDS,
        qkv_bias=True,
        defaults="single-block",
        adapted="paper",
    ),
    "sdar": Family(  # SDAR-*-Chat (-b8 to -b64), TraDo, TDAR
        label="sdar",
        prompt_attention="grid",
        shift_logits=False,
        block_size=4,
        variants=(Variant(named="trado", defaults="trado"),),
        mask_token="<|MASK|>",
        mask_id=151669,
        eos_tokens=_QWEN_ENDS,
        qk_norm=True,
        head_dim=128,
        defaults="sdar",
    ),
    "sdar_moe": Family(  # SDAR-30B-A3B-Chat, -Sci
        label="sdar",
        layout="qwen3-moe",
        prompt_attention="grid",
        shift_logits=False,
        block_size=4,
        mask_token="<|MASK|>",
        mask_id=151669,
        eos_tokens=_QWEN_ENDS,
        qk_norm=True,
        head_dim=128,
        defaults="sdar",
    ),
    "llada2_moe": Family(  # LLaDA2.0-mini, -flash, -CAP, LLaDA2.1
        label="llada2",
        layout="llada2",
        prompt_attention="grid",
        shift_logits=False,
        block_size=32,
        variants=(
            Variant(named="llada2.1", defaults="llada2.1"),
            Variant(
                named="llada2.2",
                defaults="llada2.1",
                refused="it deletes and inserts tokens; LLaDA2.0 and 2.1 are run",
            ),
        ),
        mask_token="<|mask|>",
        mask_id=156895,
        eos_tokens={"<|endoftext|>": 156892, "<|role_end|>": 156900},
        qk_norm=True,
        rope_theta=None,
        norm_eps=None,
        defaults="llada2",
    ),
    "nemotron_labs_diffusion": Family(  # Nemotron-Labs-Diffusion-3B, -8B, -14B, -Base
        label="nemotron",
        layout="nemotron",
        prompt_attention="causal",
        commit_attention="causal",
        shift_logits=True,
        drafts_in_place=True,
        block_size=32,
        mask_id=100,
        eos_tokens={},
        head_dim=128,
        rope_theta=1e6,
        norm_eps=1e-5,
        defaults="nemotron",
    ),
    "Fast_dLLM_Qwen": Family(
        label="fast_dllm_v2",
        prompt_attention="grid",
        shift_logits=True,
        block_size=32,
        mask_token="|<MASK>|",
        mask_id=151665,
        eos_tokens=_QWEN_ENDS,
        qkv_bias=True,
        defaults="fast-dllm-v2",
    ),
    "stable-diffcoder": Family(  # Stable-DiffCoder-8B; model_type "llama", see `recognition`
        label="stable-diffcoder",
        prompt_attention="grid",
        shift_logits=False,
        block_size=4,
        mask_id=5,
        eos_tokens={"<[end▁of▁sentence]>": 2},
        defaults="stable-diffcoder",
    ),
    "a2d-qwen3": Family(  # Tiny-A2D (bd3lm, mdlm), OPDLM
        label="a2d",
        prompt_attention="prompt_grid",
        shift_logits=False,
        block_size=32,
        variants=_A2D_VARIANTS,
        mask_token="<|mask|>",
        mask_id=151669,
        eos_tokens=_QWEN_ENDS,
        qk_norm=True,
        head_dim=128,
        defaults="tiny-a2d",
    ),
    "a2d-qwen2": Family(  # Tiny-A2D from Qwen2.5-Coder
        label="a2d",
        prompt_attention="prompt_grid",
        shift_logits=False,
        block_size=32,
        variants=_A2D_VARIANTS,
        mask_token="<|mask|>",
        mask_id=151669,
        eos_tokens=_QWEN_ENDS,
        qkv_bias=True,
        defaults="tiny-a2d",
    ),
    "llama": Family(
        label="llama",
        prompt_attention="causal",
        shift_logits=True,
        block_size=1,
        eos_tokens={"<|end_of_text|>": 128001, "<|eom_id|>": 128008, "<|eot_id|>": 128009},
        defaults="autoregressive",
    ),
    "qwen2": Family(
        label="qwen2",
        prompt_attention="causal",
        shift_logits=True,
        block_size=1,
        eos_tokens=_QWEN_ENDS,
        qkv_bias=True,
        defaults="autoregressive",
    ),
    "qwen3": Family(
        label="qwen3",
        prompt_attention="causal",
        shift_logits=True,
        block_size=1,
        eos_tokens=_QWEN_ENDS,
        qk_norm=True,
        head_dim=128,
        defaults="autoregressive",
    ),
}
"""By the `model_type` of config.json."""
