"""Nemotron-Labs-Diffusion with tiny sizes, and answers of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2f_runtime.backends.base import Backend, StepRow
from d2f_runtime.engine.denoiser import decoder_of
from d2f_stream.core.params import GenerationParams
from d2f_stream.core.presets import PRESETS
from tiny_checkpoints import (
    FAMILIES,
    added_tokens,
    additive,
)

KIND = "nemotron_labs_diffusion"
TINY = FAMILIES[KIND]
IDS = added_tokens(TINY)


MASK, END = IDS["<SPECIAL_100>"], IDS["<SPECIAL_11>"]


SIZE = 8


PROMPT = [40, 41, 60, 8, 120, 7, 55, 90, 33, 14, 200]


def seen(length: int, block: int) -> Tensor:
    """Who sees whom: causal up to `block`, everything from there on."""
    visible = torch.ones(length, length).tril().bool()
    visible[block:] = True
    return visible


@torch.no_grad()
def forward(model: Any, canvas: Sequence[int], block: int) -> Tensor:
    """Return [length, V] logits of an oracle; what must not be said is out."""
    mask = additive(seen(len(canvas), block))
    dtype = model.lm_head.weight.dtype
    out: Tensor = model(
        torch.tensor([canvas]), attention_mask=mask.to(dtype), use_cache=False
    ).logits[0]
    out[:, MASK] = out[:, max(IDS.values()) + 1 :] = -torch.inf
    return out


def answered(backend: Backend, params: GenerationParams) -> tuple[list[int], list[float]]:
    """Decode with a backend; return the answer and every confidence on the way."""
    decoder = decoder_of(backend.info, PROMPT, params)
    slot, found = backend.open_slot(len(PROMPT) + params.max_new_tokens), []
    while window := decoder.next_window():
        (proposals,) = backend.step([StepRow(slot, window)])
        found += [proposals.confidence[at] for at in window.asked(MASK)]
        decoder.apply(proposals)
    backend.close_slot(slot)
    return list(decoder.answer_tokens), found


def replace_params(changes: Any) -> GenerationParams:
    return PRESETS["nemotron"].with_overrides(changes)
