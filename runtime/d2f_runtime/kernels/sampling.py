"""From logits to proposals: token, confidence and ranks per row, on the device.

The same functions run in the torch backend and, exported, inside the ONNX graph, so that both draw
equal tokens. Everything here is fp32. A row with a logit that is NaN or infinite has the confidence
NaN, so that whoever reads the answers knows, without another look at the logits.

Shapes: rows of any leading shape, V vocabulary.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "FORBIDDEN",
    "Scores",
    "best",
    "draw",
    "forbid",
    "ids_on",
    "keep_nucleus",
    "propose",
    "score",
    "temper",
]

FORBIDDEN = -1e9  # finite: weight 0 times minus infinity is NaN in the entropy


class Scores(NamedTuple):
    """What a row's distribution says; each [...] but the weights.

    Attributes:
        token: int64, the best id.
        confidence: its probability.
        margin: between the two best probabilities.
        neg_entropy: sum of p log p; 0 where all mass is on one id.
        weights: [..., V] probabilities times `total`; the best id weighs 1.
        total: sum of the weights.
    """

    token: Tensor
    confidence: Tensor
    margin: Tensor
    neg_entropy: Tensor
    weights: Tensor
    total: Tensor


def forbid(
    logits: Tensor, *, mask_id: int, num_tokens: int, unnamed_ids: tuple[int, ...] = ()
) -> Tensor:
    """Return fp32 logits whose mask id and ids without a token can never be chosen.

    Args:
        logits: [..., V] of any float type.
        mask_id: of the mask.
        num_tokens: ids from here on are padding of the vocabulary.
        unnamed_ids: the gaps before that.
    """
    ids = torch.arange(logits.shape[-1], device=logits.device)
    forbidden = (ids == mask_id) | (ids >= num_tokens)
    if unnamed_ids:
        forbidden = forbidden.index_fill(0, ids_on(unnamed_ids, logits.device), True)
    return logits.float().masked_fill(forbidden, FORBIDDEN)


@functools.lru_cache(maxsize=8)
def ids_on(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Return ids on a device; int64."""
    return torch.tensor(ids, device=device)


def temper(logits: Tensor, temperature: Tensor) -> Tensor:
    """Divide logits [..., V] by temperatures [...]; 0 (greedy) leaves a row as it is."""
    return logits / torch.where(temperature > 0, temperature, 1.0)[..., None]


def keep_nucleus(logits: Tensor, top_p: Tensor) -> Tensor:
    """Forbid everything after the first token whose cumulative probability exceeds top_p.

    Args:
        logits: [..., V] fp32, already tempered.
        top_p: [...] fp32 in (0, 1]; 1 keeps everything.
    """
    ordered, order = logits.sort(dim=-1, descending=True)
    probability = ordered.softmax(dim=-1)
    drop = (probability.cumsum(dim=-1) - probability) > top_p[..., None]
    drop = drop & (top_p[..., None] < 1.0)
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), FORBIDDEN)


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's best token and its probability, as `score` does, and nothing else.

    Args:
        logits: [..., V] fp32, forbidden ids at FORBIDDEN.
    """
    highest, token = logits.topk(1, dim=-1)
    return token[..., 0], 1.0 / (logits - highest).exp().sum(dim=-1) + _doubt(logits)


def score(logits: Tensor) -> Scores:
    """Choose each row's best token and say how sure the model is.

    Args:
        logits: [..., V] fp32, tempered, forbidden ids at FORBIDDEN.
    """
    highest, token = logits.topk(2, dim=-1)
    below = logits - highest[..., :1]
    weights = below.exp()
    total = weights.sum(dim=-1)
    confidence = 1.0 / total + _doubt(logits)
    margin = (1.0 - (highest[..., 1] - highest[..., 0]).exp()) * confidence
    neg_entropy = (weights * below).sum(dim=-1) * confidence - total.log()
    return Scores(token[..., 0], confidence, margin, neg_entropy, weights, total)


def _doubt(logits: Tensor) -> Tensor:
    """Return [...] 0, or NaN where a logit is NaN or minus infinity; the rest shows in the sums."""
    lowest = logits.amin(dim=-1)
    return lowest - lowest


def draw(scores: Scores, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token per row by the inverse CDF at `uniforms` [...]; with its probability."""
    passed = scores.weights.cumsum(dim=-1) <= (uniforms * scores.total)[..., None]
    drawn = passed.sum(dim=-1)
    # rounding can leave the whole sum at or below the threshold
    drawn = torch.where(drawn < scores.weights.shape[-1], drawn, scores.token)
    weight = scores.weights.gather(-1, drawn[..., None])[..., 0]
    return drawn, weight * scores.confidence


def propose(
    logits: Tensor, temperature: Tensor | None = None, uniforms: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose a token per row.

    Args:
        logits: [..., V] fp32, tempered (see `temper`), forbidden ids at FORBIDDEN.
        temperature: [...] fp32; 0 takes the best token, above 0 draws one at `uniforms`; None is 0
            everywhere, without the sampler's work.
        uniforms: [...] fp32 in [0, 1); ignored where temperature is 0.

    Returns:
        token int64, its probability, margin and negative entropy (see Scores); each [...].
    """
    scores = score(logits)
    token, confidence = scores.token, scores.confidence
    if temperature is not None and uniforms is not None:
        drawn, probability = draw(scores, uniforms)
        token = torch.where(temperature > 0, drawn, token)
        confidence = torch.where(temperature > 0, probability, confidence)
    return token, confidence, scores.margin, scores.neg_entropy
