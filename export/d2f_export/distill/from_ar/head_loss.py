"""The loss over a large vocabulary, a few rows at a time: logits are never all held.

Value and gradient are computed together in the forward pass, so that the backward pass only scales.
"""

from functools import cache
from typing import Any, Final, cast

import torch
from torch import Tensor

from d2f_export.distill.from_ar.settings import Loss

__all__ = ["head_loss"]

ROWS: Final = 4096  # whose logits are held at a time


def head_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    weights: Tensor,
    head: Tensor,
    *,
    kind: Loss,
    fused: bool,
) -> Tensor:
    """Return the weighted mean loss, a scalar fp32.

    kl is the forward divergence KL(teacher || student), ce the cross entropy to the label, both
    their mean.

    Args:
        student: [P, D] final states.
        teacher: [P, D] final states of the autoregressive model; no gradient.
        labels: [P] the tokens that stand there.
        weights: [P] fp32.
        head: [V, D], of both; frozen.
        kind: which loss.
        fused: compile what is not a product; P is then a multiple of ROWS.
    """
    loss = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        student, head, teacher, labels, weights, kind, fused
    )
    return cast(Tensor, loss)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        head: Tensor,
        teacher: Tensor,
        labels: Tensor,
        weights: Tensor,
        kind: Loss,
        fused: bool,
    ) -> Tensor:
        rows = _fused() if fused else _rows
        total = weights.sum().clamp(min=1e-6)
        share = {"kl": 1.0, "ce": 0.0, "both": 0.5}[kind]
        gradient = torch.empty_like(student)
        loss = torch.zeros((), device=student.device)
        for first in range(0, len(student), ROWS):
            part = slice(first, first + ROWS)
            value, slope = rows(
                student[part] @ head.T,
                teacher[part] @ head.T,
                labels[part],
                weights[part] / total,
                share,
            )
            loss += value
            gradient[part] = slope @ head
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outer[0].to(gradient.dtype), *[None] * 6)


def _rows(
    logits: Tensor, teacher: Tensor, labels: Tensor, weights: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """Return the summed loss and its slope at the logits, in their dtype."""
    ours = torch.log_softmax(logits.float(), dim=-1)
    theirs = torch.log_softmax(teacher.float(), dim=-1)
    goal = theirs.exp()
    kl = (goal * (theirs - ours)).sum(dim=-1)
    index = labels[:, None]
    ce = -ours.gather(1, index)[:, 0]
    value = ((share * kl + (1 - share) * ce) * weights).sum()
    aim = share * goal
    if share < 1:
        places = torch.arange(logits.shape[1], device=logits.device)
        aim = aim + (1 - share) * (places == index)
    slope = (ours.exp() - aim) * weights[:, None]
    return value, slope.to(logits.dtype)


@cache
def _fused() -> Any:
    return torch.compile(_rows, dynamic=False)
