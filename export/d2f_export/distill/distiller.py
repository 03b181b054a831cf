"""Distiller: one forward of teacher and student over a corrupted batch, and the loss of both.

Asymmetric distillation (arXiv 2508.09192, section 3) as the released code computes it: the teacher
sees the whole canvas, the student its own and earlier blocks; the loss of a masked position is over
the mask ratio of its block. An objective says what of this a training does: with no teacher and the
whole canvas in sight it is masked diffusion, with no masks and a causal sight autoregression.

Shapes: B sequences, T positions, D hidden size, N positions with a loss, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from d2f_export.distill.attention import Mask, block_mask
from d2f_export.distill.corruption import BlockNoise, Corrupted, Corruption
from d2f_export.distill.feed import Batch
from d2f_export.distill.losses import cross_entropy, forward_kl, reverse_kl
from d2f_export.distill.student import adapters_off
from d2f_runtime.models.rotary import rotary
from d2f_runtime.models.transformer import Transformer

__all__ = ["Distiller", "LossWeights", "Objective"]

MIN_RATIO: Final = 0.05  # bounds the 1/p weight


@dataclass(frozen=True, slots=True)
class LossWeights:
    """What the loss is made of."""

    forward_kl: float = 1.0
    reverse_kl: float = 0.0
    cross_entropy: float = 0.0

    @property
    def needs_teacher(self) -> bool:
        """Whether a part of it is the teacher's."""
        return self.forward_kl > 0 or self.reverse_kl > 0


@dataclass(frozen=True, slots=True)
class Objective:
    """What a training minimises; the defaults are those of the released D2F training.

    Attributes:
        noise: how batches are corrupted.
        weights: of the parts of the loss.
        sees: what a position of the student sees: its own and earlier blocks, all, or what is
            before it. The teacher sees all.
        mean_over: what the sum over a batch is divided by: its masks, or all positions that could
            have been masked, which makes the loss an unbiased estimate of the loss of an answer.
    """

    noise: Corruption = field(default_factory=BlockNoise)
    weights: LossWeights = field(default_factory=LossWeights)
    sees: Literal["blocks", "all", "before"] = "blocks"
    mean_over: Literal["masks", "answer"] = "masks"


class Distiller(nn.Module):
    """The student with its teacher, as the one module that a training wraps.

    Args:
        student: in training; with adapters, or all of it.
        teacher: a frozen copy; None runs the student with its adapters off.
        objective: what the student learns.
        attention: of a student that sees blocks.
        checkpointing: recompute each layer in the backward pass.
        logit_rows: positions whose logits are held at a time.

    Attributes:
        attention, checkpointing: as given; may be changed between forwards.
    """

    def __init__(
        self,
        student: Transformer,
        teacher: Transformer | None,
        objective: Objective,
        *,
        attention: Literal["flex", "dense"],
        checkpointing: bool = True,
        logit_rows: int = 512,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self._objective = objective
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

    def draw(self, batch: Batch, generator: torch.Generator) -> Corrupted:
        """Return the batch as the objective corrupts it; on the host."""
        return self._objective.noise.draw(batch, generator, mask_id=self.student.config.mask_id)

    def forward(self, batch: Corrupted) -> Tensor:
        """Return the loss of a batch, a scalar."""
        mask, causal = None, self._objective.sees == "before"
        if self._objective.sees == "blocks":
            mask = block_mask(batch.blocks, self.attention)
        counted = batch.masked  # before any of them is filled
        if self._objective.mean_over == "answer":
            counted = (batch.blocks >= 0) & (batch.ratio > 0)
        if batch.threshold is not None:
            batch = self._stepped(batch, mask, batch.threshold)
        soft = None
        if self._objective.weights.needs_teacher:
            with torch.no_grad(), self._teaching() as teacher:
                soft = self._predicting(self._states(teacher, batch.noisy, None), batch.masked)
        states = self._states(self.student, batch.noisy, mask, causal=causal)
        states = self._predicting(states, batch.masked)
        targets = batch.clean[batch.masked]
        weight = 1.0 / batch.ratio[batch.masked].clamp(min=MIN_RATIO)
        total = states.new_zeros((), dtype=torch.float32)
        for part in self._parts(len(states)):
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
        return total / counted.sum().clamp(min=1)

    @torch.no_grad()
    def _stepped(self, batch: Corrupted, mask: Mask, threshold: float) -> Corrupted:
        """Fill the masks that the student gets right with confidence, as a decoding step would."""
        states = self._predicting(self._states(self.student, batch.noisy, mask), batch.masked)
        targets = batch.clean[batch.masked]
        masked, left = batch.masked.clone(), []
        for part in self._parts(len(states)):
            confidence, best = self.student.logits(states[part]).float().softmax(-1).max(-1)
            left.append((confidence <= threshold) | (best != targets[part]))
        masked[batch.masked] = torch.cat(left)
        return replace(batch, masked=masked, noisy=torch.where(masked, batch.noisy, batch.clean))

    def _parts(self, number: int) -> Iterator[slice]:
        """Yield slices of as many rows as may be held; an empty one where there are none."""
        for start in range(0, max(1, number), self._logit_rows):
            yield slice(start, start + self._logit_rows)

    @contextmanager
    def _teaching(self) -> Iterator[Transformer]:
        if self.teacher is not None:
            yield self.teacher
            return
        with adapters_off(self.student):
            yield self.student

    def _states(
        self, model: Transformer, tokens: Tensor, mask: Mask, *, causal: bool = False
    ) -> Tensor:
        """Return the final states, [B, T, D]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        rope = rotary(positions, model.config)
        x = model.embed_tokens(tokens)
        grad = torch.is_grad_enabled()
        if grad and not x.requires_grad:  # a frozen embedding; attention looks at this flag
            x.requires_grad_()
        for layer in model.layers:
            if grad and self.checkpointing:
                x, _ = checkpoint(layer, x, rope, mask, None, causal=causal, use_reentrant=False)
            else:
                x, _ = layer(x, rope, mask, None, causal=causal)
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
        weights = self._objective.weights
        logits = self.student.logits(states)
        total = logits.new_zeros((), dtype=torch.float32)
        if soft is not None:
            with torch.no_grad():
                teacher = (self.teacher or self.student).logits(soft)
            if weights.forward_kl:
                total = total + weights.forward_kl * forward_kl(logits, teacher, weight)
            if weights.reverse_kl:
                total = total + weights.reverse_kl * reverse_kl(logits, teacher, weight)
        if weights.cross_entropy:
            total = total + weights.cross_entropy * cross_entropy(logits, targets, weight)
        return total
