"""From final states to answers with torch alone: any temperature, nucleus and seed.

Shapes: N masks over all rows, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from d2f_runtime.backends.base import StepRow
from d2f_runtime.backends.rows import Floats, Masks, divisor_of
from d2f_runtime.kernels.sampling import forbid, keep_nucleus, propose, temper
from d2f_runtime.models.config import TransformerConfig

__all__ = ["answer_states", "sampling_of"]

MAX_HEAD_ELEMENTS = 1 << 27  # logits of one head call; bounds its memory at large vocabularies


def sampling_of(rows: Sequence[StepRow], masks: Masks) -> tuple[Floats | None, bool]:
    """Return [3, N] temperature, top_p and uniforms (None where all is greedy); any nucleus?"""
    if not any(row.temperature > 0 for row in rows):
        return None, False
    values = [
        (divisor_of(row), row.top_p, row.uniforms[i] if row.uniforms else 0.0)
        for row, positions in zip(rows, masks, strict=True)
        for i in positions
    ]
    nucleus = any(row.temperature > 0 and row.top_p < 1 for row in rows)
    return np.array(values, dtype=np.float32).reshape(-1, 3).T.copy(), nucleus


def answer_states(
    states: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    config: TransformerConfig,
    *,
    sampling: Floats | None,
    nucleus: bool,
) -> Tensor:
    """Return [4, N] fp32 token, confidence, margin, neg_entropy; in pieces of bounded memory.

    Args:
        states: [N, D] final states, N at least 1.
        logits_of: the head, [.., D] to [.., V].
        config: of the model.
        sampling: see `sampling_of`.
        nucleus: whether any row has a top_p below 1.
    """
    noise = None if sampling is None else torch.from_numpy(sampling).to(states.device)
    answers: list[Tensor] = []
    length = max(1, MAX_HEAD_ELEMENTS // config.vocab_size)
    for begin in range(0, states.shape[0], length):
        piece = slice(begin, begin + length)
        logits = forbid(
            logits_of(states[piece]),
            mask_id=config.mask_id,
            num_tokens=config.num_tokens,
            unnamed_ids=config.unnamed_ids,
        )
        if noise is None:
            proposed = propose(logits)
        else:
            temperature, top_p, uniforms = noise[:, piece]
            logits = temper(logits, temperature)
            if nucleus:
                greedy_keeps_all = torch.where(temperature > 0, top_p, 1.0)
                logits = keep_nucleus(logits, greedy_keeps_all)
            proposed = propose(logits, temperature, uniforms)
        # fp32 holds ids below 2**24 exactly
        answers.append(torch.stack([values.float() for values in proposed]))
    return torch.cat(answers, dim=1)
