"""Comparison of an exported artefact with the checkpoint that it was made from.

By logits, by what the decoder sees, that is the proposals of every step when both are shown the
same windows, and by the answers when each goes its own way. fp32 artefacts agree to rounding;
quantized ones are judged by the shares.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from d2f_runtime.backends.base import Backend, StepRow
from d2f_runtime.backends.onnx_backend import OnnxBackend
from d2f_runtime.backends.rows import num_forwarded
from d2f_runtime.decoding.window import NO_TOKEN, Proposals, Window
from d2f_runtime.engine.denoiser import Decoder, decoder_of
from d2f_runtime.models.facts import ModelInfo
from d2f_runtime.models.masks import block_causal_mask
from d2f_runtime.models.transformer import Transformer
from d2f_stream.core.params import GenerationParams

__all__ = ["Comparison", "LogitsComparison", "compare_backends", "compare_logits"]


@dataclass(frozen=True, slots=True)
class LogitsComparison:
    """How far a candidate's logits are from the reference's, forbidden ids left out.

    Attributes:
        num_rows: compared, one for each mask of each step.
        max_error: the largest difference.
        max_relative: the same by the largest logit of its row, or 1 where that is smaller.
        mean_error: over all logits.
        top1: share of rows whose best token is the same.
        moved: largest differences of the reference's logits, and of the candidate's, between two
            computations of the same step, for steps beyond `exact`; zeros where there were none. It
            tells a wrong graph from a machine that does not compute the same thing twice.
    """

    num_rows: int
    max_error: float
    max_relative: float
    mean_error: float
    top1: float
    moved: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far a candidate is from the reference.

    Attributes:
        num_prompts: decoded.
        num_proposals: compared, over all steps of all prompts.
        token_agreement: share of proposals that name the same token.
        max_confidence_error: the largest difference of confidence.
        mean_confidence_error: over all proposals.
        same_blocks: share of the reference's blocks that the candidate committed alike when each
            decodes alone.
        same_answers: share of prompts with the same answer then.
        steps: of the reference and of the candidate, when each decodes alone.
    """

    num_prompts: int
    num_proposals: int
    token_agreement: float
    max_confidence_error: float
    mean_confidence_error: float
    same_blocks: float
    same_answers: float
    steps: tuple[int, int]


def compare_backends(
    reference: Backend,
    candidate: Backend,
    prompts: Sequence[Sequence[int]],
    params: GenerationParams,
) -> Comparison:
    """Decode every prompt greedily with both.

    Raises:
        ValueError: the backends are not of the same model family, or there is no prompt.
    """
    for name in (
        "mask_id",
        "eos_ids",
        "shift_logits",
        "drafts_in_place",
        "prompt_attention",
        "num_tokens",
    ):
        expected, found = getattr(reference.info, name), getattr(candidate.info, name)
        if expected != found:
            raise ValueError(f"{name} is {expected} in the reference but {found} in the candidate")
    if not prompts:
        raise ValueError("there is no prompt to compare by")
    agree: list[bool] = []
    errors: list[float] = []
    same: list[bool] = []
    blocks: list[bool] = []
    steps = [0, 0]
    for prompt in prompts:
        led, pairs = _decode(reference, prompt, params, shadow=candidate)
        for one, other in pairs:
            agree += [a == b for a, b in zip(one.tokens, other.tokens, strict=True) if a >= 0]
            errors += [
                abs(a - b)
                for token, a, b in zip(one.tokens, one.confidence, other.confidence, strict=True)
                if token != NO_TOKEN
            ]
        alone, _ = _decode(candidate, prompt, params)
        ours, theirs = _useful(led), _useful(alone)
        same.append(ours == theirs)
        size = params.block_size
        blocks += [ours[i : i + size] == theirs[i : i + size] for i in range(0, len(ours), size)]
        steps[0] += led.num_steps
        steps[1] += alone.num_steps
    return Comparison(
        num_prompts=len(prompts),
        num_proposals=len(agree),
        token_agreement=sum(agree) / len(agree),
        max_confidence_error=max(errors),
        mean_confidence_error=sum(errors) / len(errors),
        same_blocks=sum(blocks) / max(1, len(blocks)),
        same_answers=sum(same) / len(same),
        steps=(steps[0], steps[1]),
    )


@torch.no_grad()
def compare_logits(
    model: Transformer,
    candidate: OnnxBackend,
    prompts: Sequence[Sequence[int]],
    params: GenerationParams,
    *,
    exact: float = float("inf"),
) -> LogitsComparison:
    """Decode by the candidate; compare each step with a forward over the whole canvas.

    Args:
        model: the reference, in fp32.
        candidate: over an artefact of it.
        prompts: token ids.
        params: how to decode.
        exact: steps with a larger relative error are computed again.
    """
    config = model.config
    allowed = torch.arange(config.num_tokens)
    allowed = allowed[~torch.isin(allowed, torch.tensor(config.forbidden_ids, dtype=torch.long))]
    errors: list[Tensor] = []
    relative: list[Tensor] = []
    agree: list[Tensor] = []
    moved = torch.zeros(2)
    for prompt in prompts:
        decoder = decoder_of(candidate.info, prompt, params)
        slot = candidate.open_slot(_capacity(candidate.info, prompt, params))
        stops: list[int] = []  # of the attention blocks that are cached
        while window := decoder.next_window():
            row = StepRow(slot, window)
            canvas = (*prompt, *decoder.answer_tokens)[: window.start]
            stops = [stop for stop in stops if stop <= window.start]
            wanted, found = both = _both(model, candidate, canvas, stops, row)[..., allowed]
            errors.append((found - wanted).abs())
            sizes = wanted.abs().amax(dim=-1).clamp(min=1.0)
            relative.append(errors[-1].amax(dim=-1) / sizes)
            if relative[-1].max() > exact:
                again = _both(model, candidate, canvas, stops, row)[..., allowed]
                moved = moved.maximum((again - both).abs().amax(dim=(1, 2)))
            agree.append(found.argmax(dim=-1) == wanted.argmax(dim=-1))
            edge = window.start + window.num_to_cache
            stops += [stop for stop in window.block_stops if stop <= edge]
            (proposals,) = candidate.step([row])
            decoder.apply(proposals)
        candidate.close_slot(slot)
    every, same = torch.cat(errors), torch.cat(agree)
    return LogitsComparison(
        num_rows=len(same),
        max_error=float(every.max()),
        max_relative=float(torch.cat(relative).max()),
        mean_error=float(every.mean()),
        top1=float(same.float().mean()),
        moved=(float(moved[0]), float(moved[1])),
    )


def _both(
    model: Transformer,
    candidate: OnnxBackend,
    cached: Sequence[int],
    stops: Sequence[int],
    row: StepRow,
) -> Tensor:
    """Return [2, masks, V] logits of the reference and of the candidate."""
    wanted = _recomputed(model, candidate.info, cached, stops, row.window)
    return torch.stack([wanted, torch.from_numpy(candidate.logits(row))])


def _recomputed(
    model: Transformer,
    info: ModelInfo,
    cached: Sequence[int],
    stops: Sequence[int],
    window: Window,
) -> Tensor:
    """Return [asked, V] logits of a window by one forward over the whole canvas."""
    canvas = Window(0, (*cached, *window.tokens), 0, (*stops, *window.block_stops))
    length = window.start + num_forwarded(window, info)
    visible = torch.tensor([canvas.visible_until()[:length]])
    mask = block_causal_mask(torch.zeros(1, dtype=torch.long), visible, 0)
    tokens = torch.tensor([canvas.tokens[:length]])
    first = window.start + window.num_to_cache
    drafts = None if model.draft is None else torch.arange(first, max(first, length))
    hidden, _ = model(tokens, torch.arange(length)[None], mask, draft_rows=drafts)
    asked = torch.tensor(window.asked(model.config.mask_id), dtype=torch.long)
    rows = asked + window.start - int(model.config.shift_logits)
    if model.config.drafts_in_place:
        rows += asked > window.num_to_cache
    return model.logits(hidden[0, rows]).float()


def _decode(
    leader: Backend,
    prompt: Sequence[int],
    params: GenerationParams,
    *,
    shadow: Backend | None = None,
) -> tuple[Decoder, list[tuple[Proposals, Proposals]]]:
    """Decode by the leader's proposals; the shadow runs the same windows."""
    backends = [leader] if shadow is None else [leader, shadow]
    can_branch = all(backend.info.branches for backend in backends)
    decoder = decoder_of(replace(leader.info, branches=can_branch), prompt, params)
    slots = [backend.open_slot(_capacity(backend.info, prompt, params)) for backend in backends]
    pairs: list[tuple[Proposals, Proposals]] = []
    try:
        while window := decoder.next_window():
            found = [
                backend.step([StepRow(slot, window)])[0]
                for backend, slot in zip(backends, slots, strict=True)
            ]
            pairs.append((found[0], found[-1]))
            decoder.apply(found[0])
    finally:
        for backend, slot in zip(backends, slots, strict=True):
            backend.close_slot(slot)
    return decoder, pairs


def _capacity(info: ModelInfo, prompt: Sequence[int], params: GenerationParams) -> int:
    beyond = max(params.block_size, info.native_block_size)
    return min(info.max_len, len(prompt) + params.max_new_tokens + beyond)


def _useful(decoder: Decoder) -> tuple[int, ...]:
    return decoder.answer_tokens[: decoder.num_useful_tokens]
