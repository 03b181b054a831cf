"""From logits to proposals: token, confidence and ranks per row, on the device.

The same functions run in the torch backend and, exported, inside the ONNX graph, so that both draw
equal tokens. Softmax and everything after it is fp32.

Shapes: R rows of any leading shape, V vocabulary.
"""

import torch
from torch import Tensor

__all__ = ["forbid", "keep_nucleus", "propose"]


def forbid(logits: Tensor, *, mask_id: int, num_tokens: int) -> Tensor:
    """Return fp32 logits whose mask id and padded vocabulary rows can never be chosen."""
    ids = torch.arange(logits.shape[-1], device=logits.device)
    forbidden = (ids == mask_id) | (ids >= num_tokens)
    return logits.float().masked_fill(forbidden, float("-inf"))


def keep_nucleus(logits: Tensor, top_p: Tensor) -> Tensor:
    """Drop everything after the first token whose cumulative probability exceeds top_p.

    Args:
        logits: [..., V] fp32, already tempered.
        top_p: [...] fp32 in (0, 1]; 1 keeps everything.
    """
    ordered, order = logits.sort(dim=-1, descending=True)
    mass = ordered.softmax(dim=-1).cumsum(dim=-1)
    drop = (mass - ordered.softmax(dim=-1)) > top_p[..., None]
    drop = drop & (top_p[..., None] < 1.0)
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), float("-inf"))


def propose(
    logits: Tensor, temperature: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose a token per row and say how sure the model is.

    Args:
        logits: [..., V] fp32, forbidden ids at -inf.
        temperature: [...] fp32; 0 takes the best token, above 0 the inverse CDF at `uniforms`.
        uniforms: [...] fp32 in [0, 1); ignored where temperature is 0.

    Returns:
        token int64, its probability, the margin between the two best probabilities, and the
        negative entropy; each [...]. Probabilities are those of the tempered distribution (d2f-spec 1.4).
    """
    safe = torch.where(temperature > 0, temperature, torch.ones_like(temperature))
    probability = (logits / safe[..., None]).softmax(dim=-1)
    best, best_id = probability.topk(2, dim=-1)
    passed = probability.cumsum(dim=-1) <= uniforms[..., None]  # inverse CDF
    drawn = passed.sum(dim=-1)
    inside = (temperature > 0) & (drawn < logits.shape[-1])  # rounding can leave the sum below u
    token = torch.where(inside, drawn, best_id[..., 0])
    confidence = probability.gather(-1, token[..., None])[..., 0]
    neg_entropy = (probability * (probability + 1e-10).log()).sum(dim=-1)
    return token, confidence, best[..., 0] - best[..., 1], neg_entropy
