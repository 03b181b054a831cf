"""The three trainings of the embedded model: autoregressive twin, teacher, student.

Twin: next-token prediction. Teacher: masked diffusion with full attention, started from the twin,
whose shifted logits it keeps (as Dream does). Student: block-causal attention, distilled from the
frozen teacher on the same noisy sequence (asymmetric distillation, arXiv 2508.09192, section 3).

Shapes: B sequences, T positions, D hidden size, N positions with a loss, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from d2f_export.losses import cross_entropy, forward_kl
from d2f_export.noise import Noisy, Schedule, block_indices, block_ratios, corrupt, uniform_ratios
from d2f_runtime.models.transformer import Transformer

__all__ = ["NoiseSettings", "Objective", "StudentObjective", "TeacherObjective", "TwinObjective"]

MIN_RATIO = 0.05  # bounds the 1/p weight


class Objective(Protocol):
    """The loss of one training."""

    @property
    def frozen(self) -> tuple[Transformer, ...]:
        """Further networks that the loss runs."""
        ...

    def __call__(
        self, model: Transformer, tokens: Tensor, prompt_lens: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the scalar loss per predicted token of [B, T] tokens and [B] prompt lengths."""
        ...


@dataclass(frozen=True, slots=True)
class NoiseSettings:
    """How answers are corrupted, block by block.

    Attributes:
        schedules: each batch draws one of these.
        block_sizes: each batch draws one of these.
        low: see block_ratios.
        high: see block_ratios.
        stepped: share of the student's batches in which one decoding step is taken first: masks
            that the student gets right with a confidence above a drawn threshold are filled. What
            stays masked is what threshold decoding leaves: the hard tokens among easy ones.
    """

    schedules: tuple[Schedule, ...] = ("monotone",)
    block_sizes: tuple[int, ...] = (16,)
    low: float = 0.2
    high: float = 0.7
    stepped: float = 0.0


class TwinObjective:
    """Cross entropy of every answer token given all before it."""

    frozen: tuple[Transformer, ...] = ()

    def __call__(
        self, model: Transformer, tokens: Tensor, prompt_lens: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the mean loss over answer tokens, EOS padding included."""
        hidden, _ = model(tokens, _positions(tokens), None, causal=True)
        answer = _positions(tokens) >= prompt_lens[:, None]
        logits, targets = _shifted(model, hidden, answer, tokens)
        return cross_entropy(logits, targets, torch.ones_like(targets)) / len(targets)


@dataclass(frozen=True, slots=True)
class TeacherObjective:
    """Cross entropy at masks over their ratio, full attention.

    Half of the batches mask uniformly, t ~ U(0.02, 1) per sequence (LLaDA's objective); the others
    use the student's block schedules, so that the teacher is at home on what it will be asked.
    """

    noise: NoiseSettings = field(default_factory=NoiseSettings)

    @property
    def frozen(self) -> tuple[Transformer, ...]:
        """None."""
        return ()

    def __call__(
        self, model: Transformer, tokens: Tensor, prompt_lens: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the 1/t-weighted loss per answer token."""
        if _draw(2) == 0:
            ratio = uniform_ratios(len(tokens), 0.02, generator)
            noisy = corrupt(
                tokens, prompt_lens, ratio, mask_id=model.config.mask_id, generator=generator
            )
        else:
            noisy, _ = _block_noise(self.noise, model, tokens, prompt_lens, generator)
        hidden, _ = model(noisy.tokens, _positions(tokens), None)
        logits, targets = _predictions(model, hidden, noisy.masked, tokens)
        return cross_entropy(logits, targets, _weight(noisy)) / _num_noised(noisy, prompt_lens)


@dataclass(frozen=True, slots=True)
class StudentObjective:
    """Forward KL from the teacher over the mask ratio, block-causal attention.

    Attributes:
        teacher: frozen; sees the same noisy sequence with full attention.
        noise: the block schedules.
        data_weight: share of cross entropy to the data in the loss; 0 is pure distillation.
    """

    teacher: Transformer
    noise: NoiseSettings = field(default_factory=NoiseSettings)
    data_weight: float = 0.0

    @property
    def frozen(self) -> tuple[Transformer, ...]:
        """The teacher."""
        return (self.teacher,)

    def __call__(
        self, model: Transformer, tokens: Tensor, prompt_lens: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the 1/p-weighted loss per noised token."""
        noisy, blocks = _block_noise(self.noise, model, tokens, prompt_lens, generator)
        mask = (blocks[:, None, :] <= blocks[:, :, None])[:, None]  # [B, 1, T, T]
        if _uniform() < self.noise.stepped:
            noisy = _stepped(model, noisy, tokens, mask)
        hidden, _ = model(noisy.tokens, _positions(tokens), mask)
        logits, targets = _predictions(model, hidden, noisy.masked, tokens)
        weight = _weight(noisy)
        loss = logits.new_zeros((), dtype=torch.float32)
        if self.data_weight < 1.0:
            with torch.no_grad():
                states, _ = self.teacher(noisy.tokens, _positions(tokens), None)
                soft, _ = _predictions(self.teacher, states, noisy.masked, tokens)
            loss = loss + (1 - self.data_weight) * forward_kl(logits, soft, weight)
        if self.data_weight > 0.0:
            loss = loss + self.data_weight * cross_entropy(logits, targets, weight)
        return loss / _num_noised(noisy, prompt_lens)


def _positions(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device)[None]


def _block_noise(
    noise: NoiseSettings,
    model: Transformer,
    tokens: Tensor,
    prompt_lens: Tensor,
    generator: torch.Generator,
) -> tuple[Noisy, Tensor]:
    """Corrupt by a drawn schedule and block size; also return the [B, T] block of each position."""
    schedule = noise.schedules[_draw(len(noise.schedules))]
    block_size = noise.block_sizes[_draw(len(noise.block_sizes))]
    blocks = block_indices(prompt_lens, tokens.shape[1], block_size)
    num_blocks = -(-tokens.shape[1] // block_size)
    ratios = block_ratios(
        schedule, len(tokens), num_blocks, generator, low=noise.low, high=noise.high
    )
    ratio = ratios.gather(1, blocks.clamp(min=0))  # [B, T]
    noisy = corrupt(tokens, prompt_lens, ratio, mask_id=model.config.mask_id, generator=generator)
    return noisy, blocks


@torch.no_grad()
def _stepped(model: Transformer, noisy: Noisy, tokens: Tensor, mask: Tensor) -> Noisy:
    """Fill the masks that the model gets right with confidence, as one decoding step would."""
    hidden, _ = model(noisy.tokens, _positions(tokens), mask)
    logits, targets = _predictions(model, hidden, noisy.masked, tokens)
    confidence, best = logits.float().softmax(dim=-1).max(dim=-1)
    threshold = 0.5 + 0.49 * _uniform()
    masked = noisy.masked.clone()
    masked[noisy.masked] = (confidence <= threshold) | (best != targets)
    return Noisy(torch.where(masked, noisy.tokens, tokens), masked, noisy.ratio)


def _uniform() -> float:
    return float(torch.rand(()))


def _draw(number: int) -> int:
    """Draw on the host, from torch's global generator: no wait for the device."""
    return int(torch.randint(number, ()))


def _predictions(
    model: Transformer, hidden: Tensor, chosen: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Return [N, V] logits and [N] targets at the chosen [B, T] positions."""
    if model.config.shift_logits:
        return _shifted(model, hidden, chosen, tokens)
    return model.logits(hidden[chosen]), tokens[chosen]


def _shifted(
    model: Transformer, hidden: Tensor, chosen: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """The same where the state before a position predicts it."""
    chosen = chosen[:, 1:]
    return model.logits(hidden[:, :-1][chosen]), tokens[:, 1:][chosen]


def _weight(noisy: Noisy) -> Tensor:
    return 1.0 / noisy.ratio[noisy.masked].clamp(min=MIN_RATIO)


def _num_noised(noisy: Noisy, prompt_lens: Tensor) -> Tensor:
    answer = _positions(noisy.tokens) >= prompt_lens[:, None]
    return (answer & (noisy.ratio > 0)).sum().clamp(min=1)
