"""From a published config.json to a `TransformerConfig`.

Pure: takes what the files say, opens none. Options that the transformer is not written for are
refused by name; ids are those that the folder's own files give.
"""

from dataclasses import dataclass

from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.config_file import ConfigFile
from d2f_runtime.models.families import Family
from d2f_runtime.models.mixture_config import MixtureConfig
from d2f_runtime.models.published_mixture import llada2_mixture, qwen3_mixture, rotary_dim
from d2f_runtime.models.published_options import refuse_variants
from d2f_runtime.models.published_rope import PublishedRope
from d2f_runtime.models.rope_scaling import RopeScaling
from d2f_runtime.text.tokenizer_files import Vocabulary
from d2f_stream.core.errors import ModelDamaged, UnsupportedModel
from d2f_stream.core.params import MAX_BLOCK_SIZE

__all__ = ["transformer_config"]


def transformer_config(
    config: ConfigFile,
    *,
    family: Family,
    generation: ConfigFile | None,
    vocabulary: Vocabulary | None,
) -> TransformerConfig:
    """Make a published model's config.

    Args:
        config: config.json.
        family: of the model.
        generation: generation_config.json.
        vocabulary: the tokenizer's; without one the ids are those of the config and, where it names
            none, the published ones.

    Raises:
        UnsupportedModel: an option that this build does not know.
        ModelDamaged: a key is missing or of the wrong kind, or there is no mask or no EOS.
    """
    refuse_variants(config, family)
    sizes = (
        _llada_sizes(config, family) if family.layout == "llada" else _llama_sizes(config, family)
    )
    vocab_size = sizes.vocab_size
    # Tokens may have been added beyond what is embedded: a text that names one is refused.
    if vocabulary is not None and vocabulary.base_size > vocab_size:
        raise ModelDamaged(
            f"the tokenizer in {config.model} has a vocabulary of {vocabulary.base_size} "
            f"ids, but the model embeds {vocab_size}; it belongs to another model"
        )
    block_size = family.block_size
    if family.prompt_attention in ("grid", "prompt_grid") or family.drafts_in_place:
        block_size = config.integer("bd_size", config.integer("block_size", block_size))
        if block_size > MAX_BLOCK_SIZE:
            raise UnsupportedModel(
                f"{config.path} has blocks of {block_size} tokens, but this build runs at most "
                f"{MAX_BLOCK_SIZE}"
            )
    is_free = family.prompt_attention == "full"  # to cut the answer as the request likes
    return TransformerConfig(
        family=family.label,
        vocab_size=vocab_size,
        num_tokens=vocab_size if vocabulary is None else min(vocab_size, vocabulary.size),
        unnamed_ids=() if vocabulary is None else vocabulary.gaps(vocab_size),
        hidden_size=sizes.hidden_size,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        ffn_size=sizes.ffn_size,
        mask_id=_mask_id(config, generation, family, vocabulary, vocab_size),
        eos_ids=_eos_ids(config, generation, family, vocabulary, vocab_size),
        rope_theta=sizes.rope_theta,
        norm_eps=config.number("rms_norm_eps", family.norm_eps),
        qkv_bias=sizes.qkv_bias,
        qk_norm=sizes.qk_norm,
        tie_embeddings=sizes.tie_embeddings,
        shift_logits=family.shift_logits,
        drafts_in_place=family.drafts_in_place,
        commit_attention=family.commit_attention,
        prompt_attention=family.prompt_attention,
        native_block_size=block_size,
        max_block_size=MAX_BLOCK_SIZE if is_free else block_size,
        max_len=sizes.max_len,
        rope_scaling=sizes.rope_scaling,
        rotary_dim=sizes.rotary_dim,
        mixture=_mixture(config, family),
    )


def _mixture(config: ConfigFile, family: Family) -> MixtureConfig | None:
    match family.layout:
        case "llada2" | "llada2-merged":
            return llada2_mixture(config)
        case "qwen3-moe":
            return qwen3_mixture(config)
        case _:
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """What the two layouts call by different names."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    max_len: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    qkv_bias: bool
    tie_embeddings: bool
    qk_norm: bool = False
    rotary_dim: int = 0


def _llada_sizes(config: ConfigFile, family: Family) -> _Sizes:
    hidden_size, num_heads = config.integer("d_model"), config.integer("n_heads")
    is_multi_query = config.flag("multi_query_attention", False)
    num_kv_heads = 1 if is_multi_query else num_heads
    if config.integer("n_kv_heads", num_kv_heads) != num_kv_heads and (
        "multi_query_attention" in config
    ):
        raise ModelDamaged(
            f"{config.path}: n_kv_heads is {config.values['n_kv_heads']}, but "
            f"multi_query_attention {is_multi_query} says {num_kv_heads}"
        )
    return _Sizes(
        vocab_size=config.integer("embedding_size", config.values.get("vocab_size")),
        hidden_size=hidden_size,
        num_layers=config.integer("n_layers"),
        num_heads=num_heads,
        num_kv_heads=config.integer("n_kv_heads", num_kv_heads),
        head_dim=max(1, hidden_size // num_heads),
        ffn_size=config.integer("mlp_hidden_size", config.integer("mlp_ratio", 4) * hidden_size),
        max_len=config.integer("max_sequence_length"),
        rope_theta=config.number("rope_theta", family.rope_theta),
        rope_scaling=None,
        qkv_bias=config.flag("include_qkv_bias", False),
        tie_embeddings=config.flag("weight_tying", "weight_tying" not in config.nulls),
    )


def _llama_sizes(config: ConfigFile, family: Family) -> _Sizes:
    hidden_size, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", family.head_dim or max(1, hidden_size // num_heads))
    is_partial = family.layout == "llada2"
    turning = rotary_dim(config, head_dim) if is_partial else 0
    rope = PublishedRope.read(
        config,
        head_dim=turning or head_dim,
        theta=family.rope_theta,
        is_partial=is_partial,
        scales_queries=family.layout == "nemotron",
    )
    return _Sizes(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=config.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        ffn_size=config.integer("intermediate_size"),
        max_len=rope.max_len,
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        qkv_bias=bool(family.qkv_bias),
        qk_norm=config.flag("use_qk_norm", True) if is_partial else family.qk_norm,
        rotary_dim=turning,
        tie_embeddings=config.flag("tie_word_embeddings", False),
    )


def _mask_id(
    config: ConfigFile,
    generation: ConfigFile | None,
    family: Family,
    vocabulary: Vocabulary | None,
    vocab_size: int,
) -> int:
    if family.mask_id is None:
        return vocab_size  # no id at all, so that every id may be produced
    named = config.ids("mask_token_id")
    if not named and generation is not None:
        named = generation.ids("mask_token_id")
    mask_id: int | None = next(iter(named), None)
    if vocabulary is None:
        mask_id = family.mask_id if mask_id is None else mask_id
    else:
        if mask_id is None:
            mask_id = vocabulary.find(family.mask_token, named="mask_token")
        if mask_id is None and family.mask_token is not None:
            mask_id = vocabulary.find(family.mask_token.upper())
        named_nowhere = mask_id is None and (
            family.mask_token is None or family.mask_id not in vocabulary
        )
        if named_nowhere and family.mask_id < vocab_size:
            mask_id = family.mask_id  # the tokenizer has another text for it, or lacks it
        elif mask_id is None or mask_id not in vocabulary:
            says = "" if mask_id is None else f"; config.json says that its id is {mask_id}"
            raise ModelDamaged(
                f"the tokenizer in {config.model} has no mask token, which a {family.label} "
                f"model calls {family.mask_token}{says}"
            )
    if mask_id >= vocab_size:
        raise ModelDamaged(
            f"{config.path}: the mask id is {mask_id} but the model embeds {vocab_size} ids"
        )
    return mask_id


def _eos_ids(
    config: ConfigFile,
    generation: ConfigFile | None,
    family: Family,
    vocabulary: Vocabulary | None,
    vocab_size: int,
) -> tuple[int, ...]:
    found = set(config.ids("eos_token_id"))
    if generation is not None:
        found.update(generation.ids("eos_token_id"))
    if vocabulary is None:
        found.update(token for token in family.eos_tokens.values() if token < vocab_size)
    else:
        named = vocabulary.find(None, named="eos_token")
        texts = [vocabulary.find(text) for text in family.eos_tokens]
        found.update(token for token in (named, *texts) if token is not None)
    if not found:
        raise ModelDamaged(
            f"nothing in {config.model} says which token ends an answer: neither config.json "
            "nor generation_config.json has an eos_token_id, and the tokenizer names no eos_token"
        )
    embedded = {token for token in found if token < vocab_size}  # others cannot be produced
    if not embedded:
        raise ModelDamaged(
            f"{config.model}: the EOS id is {max(found)} but the model embeds {vocab_size} ids"
        )
    return tuple(sorted(embedded))
