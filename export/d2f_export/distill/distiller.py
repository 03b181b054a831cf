"""Distiller: one forward of teacher and student over a corrupted batch, and the loss of both.

Asymmetric distillation (arXiv 2508.09192, section 3) as the released code computes it: the teacher
sees the whole canvas, the student its own and earlier blocks; the loss of a masked position is over
the mask ratio of its block; a plain mean over the micro-batch's positions with a loss.

Shapes: B sequences, T positions, D hidden size, N positions with a loss, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from d2f_export.distill.attention import Mask, block_mask
from d2f_export.distill.corruption import Corrupted
from d2f_export.distill.student import adapters_off
from d2f_export.losses import cross_entropy, forward_kl, reverse_kl
from d2f_runtime.models.transformer import Transformer, rotary

__all__ = ["Distiller", "LossWeights"]

MIN_RATIO = 0.05  # bounds the 1/p weight


@dataclass(frozen=True, slots=True)
class LossWeights:
    """What the loss is made of."""

    forward_kl: float = 1.0
    reverse_kl: float = 0.0
    cross_entropy: float = 0.0


class Distiller(nn.Module):
    """The student with its teacher, as the one module that a training wraps.

    Args:
        student: in training; with adapters, or all of it.
        teacher: a frozen copy; None runs the student with its adapters off.
        weights: of the parts of the loss.
        attention: of the student.
        checkpointing: recompute each layer in the backward pass.
        logit_rows: positions whose logits are held at a time.

    Attributes:
        attention, checkpointing: as given; may be changed between forwards.
    """

    def __init__(
        self,
        student: Transformer,
        teacher: Transformer | None,
        *,
        weights: LossWeights,
        attention: Literal["flex", "dense"],
        checkpointing: bool = True,
        logit_rows: int = 512,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self._weights = weights
        self.attention = attention
        self.checkpointing = checkpointing
        self._logit_rows = logit_rows

    def tie_weights(self) -> None:
        """Share the embedding with the head again; accelerate calls it where FSDP has moved both.

        Without it a tied head would stay as it is while the embedding is trained.
        """
        for model in (self.student, self.teacher):
            if model is not None and model.config.tie_embeddings:
                model.lm_head.weight = model.embed_tokens.weight

    def forward(self, batch: Corrupted) -> Tensor:
        """Return the loss of a batch, a scalar."""
        soft = None
        if self._weights.forward_kl or self._weights.reverse_kl:
            with torch.no_grad(), self._teaching() as teacher:
                soft = self._predicting(self._states(teacher, batch.teacher, None), batch.masked)
        mask = block_mask(batch.blocks, self.attention)
        states = self._predicting(self._states(self.student, batch.student, mask), batch.masked)
        targets = batch.clean[batch.masked]
        weight = 1.0 / batch.ratio[batch.masked].clamp(min=MIN_RATIO)
        total = states.new_zeros((), dtype=torch.float32)
        for rows in range(0, max(1, len(states)), self._logit_rows):
            part = slice(rows, rows + self._logit_rows)
            inputs = (
                states[part],
                None if soft is None else soft[part],
                targets[part],
                weight[part],
            )
            if len(states) > self._logit_rows:
                total = total + checkpoint(self._loss, *inputs, use_reentrant=False)
            else:
                total = total + self._loss(*inputs)
        return total / max(1, len(states))

    @contextmanager
    def _teaching(self) -> Iterator[Transformer]:
        if self.teacher is not None:
            yield self.teacher
            return
        with adapters_off(self.student):
            yield self.student

    def _states(self, model: Transformer, tokens: Tensor, mask: Mask) -> Tensor:
        """Return the final states, [B, T, D]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        rope = rotary(positions, model.config)
        x = model.embed_tokens(tokens)
        grad = torch.is_grad_enabled()
        if grad and not x.requires_grad:  # a frozen embedding; attention looks at this flag
            x.requires_grad_()
        for layer in model.layers:
            if grad and self.checkpointing:
                x, _ = checkpoint(layer, x, rope, mask, None, use_reentrant=False)
            else:
                x, _ = layer(x, rope, mask, None)
        states: Tensor = model.norm(x)
        return states

    def _predicting(self, states: Tensor, masked: Tensor) -> Tensor:
        """Return the states that predict the masked positions, [N, D].

        Position 0 belongs to the prompt, so that a shifted model has a state before each.
        """
        if self.student.config.shift_logits:
            return states[:, :-1][masked[:, 1:]]
        return states[masked]

    def _loss(self, states: Tensor, soft: Tensor | None, targets: Tensor, weight: Tensor) -> Tensor:
        """Return the weighted sum over [n, D] states."""
        logits = self.student.logits(states)
        total = logits.new_zeros((), dtype=torch.float32)
        if soft is not None:
            with torch.no_grad():
                teacher = (self.teacher or self.student).logits(soft)
            if self._weights.forward_kl:
                total = total + self._weights.forward_kl * forward_kl(logits, teacher, weight)
            if self._weights.reverse_kl:
                total = total + self._weights.reverse_kl * reverse_kl(logits, teacher, weight)
        if self._weights.cross_entropy:
            total = total + self._weights.cross_entropy * cross_entropy(logits, targets, weight)
        return total
