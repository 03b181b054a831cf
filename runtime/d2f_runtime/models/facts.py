"""What must be known of a model, whoever runs it: its facts, and what is told about it."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from d2f_stream.core.identity import ModelIdentity

__all__ = [
    "FAMILIES",
    "WITHOUT_THOUGHTS",
    "About",
    "CommitAttention",
    "ModelFacts",
    "ModelInfo",
    "PromptAttention",
]

FAMILIES = (
    "a2d", "dream", "fast_dllm_v2", "llada", "llada2", "llama", "nemotron", "qwen2", "qwen3",
    "scripted", "sdar", "stable-diffcoder",
)  # fmt: skip
"""The kinds of model that folders may name; "scripted" has no transformer."""

WITHOUT_THOUGHTS = ("a2d",)
"""Those whose chat template, their ancestor's, opens thoughts that they were not trained on."""

PromptAttention = Literal["full", "causal", "grid", "prompt_grid"]
CommitAttention = Literal["block", "causal"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a model's config, its manifest and a loaded model tell alike.

    Attributes:
        family: one of FAMILIES; a label only, the switches decide.
        mask_id: id of the mask token; for autoregressive models any id that is never produced.
        eos_ids: every id that ends an answer.
        num_tokens: ids that may be produced; rows beyond are padding and forbidden.
        shift_logits: True where row i-1 predicts position i (Dream and autoregressive models).
        drafts_in_place: with shifted logits, whether rows that are denoised predict their own
            position all the same; the first of them is predicted by the cached row before it.
        prompt_attention: "full" is one bidirectional block, "causal" one block per position, "grid"
            blocks on multiples of `native_block_size`, "prompt_grid" blocks of that size that end
            with the prompt, whose first may be shorter.
        commit_attention: how a block's rows attend when its K/V are cached: "block" as they did
            before, "causal" each position like the autoregressive model that this one is made of.
        native_block_size: what the model was trained for, tokens; 1 for autoregressive models.
        max_block_size: upper bound for a request's block size, tokens.
        max_len: prompt and answer together, tokens.
    """

    family: str
    mask_id: int
    eos_ids: tuple[int, ...]
    num_tokens: int
    shift_logits: bool = False
    drafts_in_place: bool = False
    prompt_attention: PromptAttention = "full"
    commit_attention: CommitAttention = "block"
    native_block_size: int = 32
    max_block_size: int = 64
    max_len: int = 4096

    @property
    def facts(self) -> dict[str, Any]:
        """These fields alone, as keyword arguments of another class that has them."""
        return {field.name: getattr(self, field.name) for field in fields(ModelFacts)}


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a model's folder tells people of it.

    Attributes:
        description: what the model can do, in a sentence or two for its users.
        license: of the weights, such as "Apache-2.0".
        examples: prompts that show what it can do.
    """

    description: str = ""
    license: str = ""
    examples: tuple[str, ...] = ()

    @property
    def about(self) -> dict[str, Any]:
        """Those of these fields that tell something, as keyword arguments."""
        told = {field.name: getattr(self, field.name) for field in fields(About)}
        return {name: value for name, value in told.items() if value}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo(ModelFacts):
    """What the decoder and the engine must know of a loaded model.

    Attributes:
        name: for people and `stream.started`.
        kv_bytes_per_token: K/V storage of one position over all layers.
        device: "cpu", "cuda:0", ...
        quantization: "fp32", "bf16", "int8", ...
        description, license, examples: see `About`.
        window_scaled: whether activations are quantised by all that a window holds, so that what is
            computed of a prompt depends on how much of it was stored before.
        spare_rows: about how many rows of a step cost as much as all else of it, so that drafts
            cost little below that.
        branches: whether steps may hold `Branch`es.
        step_sessions: how many sessions may share a step, whose shapes warming up makes ready.
        one_by_one: whether the sessions of a step run one after another, so that each takes what it
            takes alone.
        identity: what tells it from others, once it is loaded with its tokenizer.
    """

    name: str
    kv_bytes_per_token: int
    device: str
    quantization: str
    description: str = ""
    license: str = ""
    examples: tuple[str, ...] = ()
    window_scaled: bool = False
    spare_rows: int = 10
    branches: bool = False
    step_sessions: int = 16
    one_by_one: bool = False
    identity: ModelIdentity | None = None

    @property
    def keeps_turns(self) -> bool:
        """Whether a loaded model computes a prompt that begins like an earlier one from there on.

        Where a prompt's K/V depend on what follows in it, only the same prompt can be reused.
        """
        return self.prompt_attention in ("causal", "grid") and not self.window_scaled
