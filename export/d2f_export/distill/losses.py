"""Losses of masked-diffusion training and of D2F distillation.

All take logits of the predicted positions only: N positions, V vocabulary. The 1/p weight makes a
sum over masked positions an unbiased estimate of the sum over all that could have been masked.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cross_entropy", "forward_kl", "reverse_kl"]


def cross_entropy(logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted sum of -log p(target), a scalar.

    Args:
        logits: [N, V].
        targets: [N] int64.
        weight: [N] fp32.
    """
    return (F.cross_entropy(logits.float(), targets, reduction="none") * weight).sum()


def forward_kl(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted sum of KL(teacher || student), a scalar; no gradient to the teacher.

    The released code's soft-label cross entropy differs by the teacher's entropy, a constant.

    Args:
        student: [N, V] logits.
        teacher: [N, V] logits.
        weight: [N] fp32.
    """
    log_q = F.log_softmax(teacher.detach().float(), dim=-1)
    log_p = F.log_softmax(student.float(), dim=-1)
    divergence: Tensor = (log_q.exp() * (log_q - log_p)).sum(dim=-1)
    return torch.sum(divergence * weight)


def reverse_kl(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted sum of KL(student || teacher), a scalar; no gradient to the teacher.

    The direction that the D2F paper writes (arXiv 2508.09192, equation 3); its code runs the other.

    Args:
        student: [N, V] logits.
        teacher: [N, V] logits.
        weight: [N] fp32.
    """
    log_q = F.log_softmax(teacher.detach().float(), dim=-1)
    log_p = F.log_softmax(student.float(), dim=-1)
    divergence: Tensor = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return torch.sum(divergence * weight)
