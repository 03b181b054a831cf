"""A tiny checkpoint of each published layout, whole canvases and their logits."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from d2f_runtime.models.transformer import Transformer
from tiny_checkpoints import Tiny, added_tokens

# logits of about 30 in fp32, summed in another order
TOLERANCE = 1e-4
LENGTH = 30
PROMPT = [40, 41, 60, 8, 120, 7, 55, 90, 33, 14, 200]


def canvas_of(tiny: Tiny) -> Tensor:
    tokens = torch.randint(0, 280, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    if tiny.mask is not None:
        tokens[0, 18:26] = added_tokens(tiny)[tiny.mask]
    return tokens


def whole(model: Transformer, tokens: Tensor, visible: Tensor) -> Tensor:
    hidden, _ = model(tokens, torch.arange(LENGTH)[None], visible[None, None])
    return model.logits(hidden)


def until_eos(tokens: Sequence[int], eos_ids: Sequence[int]) -> list[int]:
    before = list(itertools.takewhile(lambda token: token not in eos_ids, tokens))
    return [*before, *tokens[len(before) : len(before) + 1]]
