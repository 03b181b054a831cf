"""The parameters of an answer: the model's own where none are given, and cut to the room it has."""

import msgspec

from d2f_runtime.engine.limits import Limits
from d2f_runtime.loaded_model import ModelParts
from d2f_runtime.models.facts import ModelInfo
from d2f_stream.core.errors import InvalidParams, MessageTooLarge, PromptTooLong
from d2f_stream.core.params import GenerationParams
from d2f_stream.core.presets import PRESETS

__all__ = ["default_params", "defaults_of", "fitted_params"]


def default_params(info: ModelInfo) -> GenerationParams:
    """Return the parameters of a request that gives none, for a model that has no defaults."""
    if info.commit_attention == "causal" and info.shift_logits and info.native_block_size > 1:
        return msgspec.structs.replace(PRESETS["verified"], block_size=info.native_block_size)
    return GenerationParams(block_size=info.native_block_size)


def defaults_of(parts: ModelParts, limits: Limits) -> GenerationParams:
    """Return the parameters of a request that gives none, on an engine of such limits."""
    if not limits.may_narrow:
        return parts.defaults
    return parts.defaults.with_overrides({"may_narrow": True})


def fitted_params(
    params: GenerationParams,
    num_prompt_tokens: int,
    parts: ModelParts,
    limits: Limits,
    *,
    must_fit: bool,
) -> GenerationParams:
    """Return the parameters of an answer that the model has room for.

    Args:
        params: as asked for.
        num_prompt_tokens: of the prompt.
        parts: of the model.
        limits: of the engine.
        must_fit: whether max_new_tokens was asked for, else it is cut to the room that is left.

    Raises:
        InvalidRequest: prompt or parameters do not fit the model, or the limits.
    """
    info = parts.info
    if params.attention == "blocks" and params.block_size > info.max_block_size:
        allowed = f"at most {info.max_block_size} for model {info.name}"
        raise InvalidParams("block_size", params.block_size, allowed)
    if limits.max_prompt_tokens is not None and num_prompt_tokens > limits.max_prompt_tokens:
        raise MessageTooLarge.of_prompt(num_prompt_tokens, limits.max_prompt_tokens)
    room = min(info.max_len, limits.max_tokens) - num_prompt_tokens
    least = params.block_size if params.tail == "drop" else 1
    on_grid = info.prompt_attention in ("grid", "prompt_grid")
    size = info.native_block_size if on_grid else params.block_size
    before = num_prompt_tokens % size if info.prompt_attention == "grid" else 0
    if params.tail == "whole":  # the last block may reach beyond the answer
        room -= (before + room) % size
    if params.max_new_tokens > room >= least and not must_fit:
        params = params.with_overrides({"max_new_tokens": room})
    needed = params.max_new_tokens
    if params.tail == "whole":
        needed += -(before + needed) % size
    if num_prompt_tokens + needed > info.max_len:
        raise PromptTooLong(num_prompt_tokens, needed, info.max_len)
    parts.backend.check(params)
    return params
