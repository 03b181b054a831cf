"""Compares an exported artefact with the checkpoint it was made from.

Logits stay inside both backends, so what is compared is what the decoder sees: the proposals of
every step when both are shown the same windows, and the answers when each goes its own way. fp32
artefacts agree to rounding; int8 ones are judged by the shares.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from d2f_runtime.backends.base import Backend, ModelInfo, StepRow
from d2f_runtime.decoder import BlockDecoder
from d2f_runtime.window import NO_TOKEN, Proposals
from d2f_stream.params import GenerationParams

__all__ = ["Comparison", "compare_backends"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far a candidate is from the reference.

    Attributes:
        num_prompts: decoded.
        num_proposals: compared, over all steps of all prompts.
        token_agreement: share of proposals that name the same token.
        max_confidence_error: the largest difference of confidence.
        mean_confidence_error: over all proposals.
        same_answers: share of prompts with the same answer when each decodes alone.
        steps: of the reference and of the candidate, when each decodes alone.
    """

    num_prompts: int
    num_proposals: int
    token_agreement: float
    max_confidence_error: float
    mean_confidence_error: float
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
    for name in ("mask_id", "eos_ids", "shift_logits", "prompt_attention", "vocab_size"):
        expected, found = getattr(reference.info, name), getattr(candidate.info, name)
        if expected != found:
            raise ValueError(f"{name} is {expected} in the reference but {found} in the candidate")
    if not prompts:
        raise ValueError("there is no prompt to compare by")
    agree: list[bool] = []
    errors: list[float] = []
    same: list[bool] = []
    steps = [0, 0]
    for prompt in prompts:
        led, pairs = _decode(reference, prompt, params, shadow=candidate)
        for ours, theirs in pairs:
            agree += [a == b for a, b in zip(ours.tokens, theirs.tokens, strict=True) if a >= 0]
            errors += [
                abs(a - b)
                for token, a, b in zip(ours.tokens, ours.confidence, theirs.confidence, strict=True)
                if token != NO_TOKEN
            ]
        alone, _ = _decode(candidate, prompt, params)
        same.append(_useful(led) == _useful(alone))
        steps[0] += led.num_steps
        steps[1] += alone.num_steps
    return Comparison(
        num_prompts=len(prompts),
        num_proposals=len(agree),
        token_agreement=sum(agree) / len(agree),
        max_confidence_error=max(errors),
        mean_confidence_error=sum(errors) / len(errors),
        same_answers=sum(same) / len(same),
        steps=(steps[0], steps[1]),
    )


def _decode(
    leader: Backend,
    prompt: Sequence[int],
    params: GenerationParams,
    *,
    shadow: Backend | None = None,
) -> tuple[BlockDecoder, list[tuple[Proposals, Proposals]]]:
    """Decode by the leader's proposals; the shadow runs the same windows."""
    decoder = _decoder(leader.info, prompt, params)
    capacity = (
        len(prompt) + params.max_new_tokens + max(params.block_size, leader.info.native_block_size)
    )
    backends = [leader] if shadow is None else [leader, shadow]
    slots = [backend.open_slot(capacity) for backend in backends]
    pairs: list[tuple[Proposals, Proposals]] = []
    try:
        while windows := decoder.next_windows():
            results = [
                backend.step([StepRow(slot, window) for window in windows])
                for backend, slot in zip(backends, slots, strict=True)
            ]
            pairs += zip(results[0], results[-1], strict=True)
            decoder.apply(results[0])
    finally:
        for backend, slot in zip(backends, slots, strict=True):
            backend.close_slot(slot)
    return decoder, pairs


def _useful(decoder: BlockDecoder) -> tuple[int, ...]:
    return decoder.answer_tokens[: decoder.num_useful_tokens]


def _decoder(info: ModelInfo, prompt: Sequence[int], params: GenerationParams) -> BlockDecoder:
    return BlockDecoder(
        prompt_tokens=prompt,
        params=params,
        mask_id=info.mask_id,
        eos_ids=info.eos_ids,
        shift_logits=info.shift_logits,
        prompt_attention=info.prompt_attention,
        native_block_size=info.native_block_size,
    )
