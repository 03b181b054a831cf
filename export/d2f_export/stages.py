"""The three trainings of the embedded model: autoregressive twin, teacher, student.

Twin: next-token prediction. Teacher: masked diffusion with full attention, started from the twin,
whose shifted logits it keeps (as Dream does). Student: block-causal attention, distilled from the
frozen teacher (asymmetric distillation, arXiv 2508.09192, section 3).

Shapes: B sequences, T positions, D hidden size, N positions with a loss, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from d2f_export.losses import cross_entropy, forward_kl, reverse_kl
from d2f_export.noise import Noisy, Schedule, block_indices, block_ratios, corrupt, uniform_ratios
from d2f_runtime.models.transformer import Transformer

__all__ = [
    "Distillation",
    "NoiseSettings",
    "Objective",
    "StudentObjective",
    "TeacherInput",
    "TeacherObjective",
    "TwinObjective",
]

TeacherInput = Literal["same", "fresh"]

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


@dataclass(frozen=True, slots=True)
class Distillation:
    """What the student learns from; the defaults are those of the published D2F code.

    Attributes:
        noise: how answers are corrupted.
        forward_kl: share of KL(teacher || student) in the loss.
        reverse_kl: share of KL(student || teacher).
        data: share of cross entropy to the data.
        teacher_input: "same" shows the teacher the student's noisy sequence. "fresh" shows it
            another draw of masks at the same ratios; the divergences are then over the positions
            that are masked in both, since at a visible one the teacher only copies.

    Raises:
        ValueError: a share is negative, or they do not add up to 1.
    """

    noise: NoiseSettings = field(default_factory=NoiseSettings)
    forward_kl: float = 1.0
    reverse_kl: float = 0.0
    data: float = 0.0
    teacher_input: TeacherInput = "same"

    def __post_init__(self) -> None:
        shares = (self.forward_kl, self.reverse_kl, self.data)
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"the loss's shares are {shares}; they must add up to 1, none below 0")


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

    Batches mask uniformly, t ~ U(0.02, 1) per sequence (LLaDA's objective), or by the student's
    block schedules, so that the teacher is at home on what it will be asked.

    Attributes:
        noise: the block schedules.
        block_share: share of the batches that use them.
    """

    noise: NoiseSettings = field(default_factory=NoiseSettings)
    block_share: float = 0.5

    @property
    def frozen(self) -> tuple[Transformer, ...]:
        """None."""
        return ()

    def __call__(
        self, model: Transformer, tokens: Tensor, prompt_lens: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the 1/t-weighted loss per answer token."""
        if _uniform() >= self.block_share:
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
    """Divergence from the teacher over the mask ratio, block-causal attention.

    Attributes:
        teacher: frozen; sees a noisy sequence with full attention.
        distillation: noise and loss.
    """

    teacher: Transformer
    distillation: Distillation = field(default_factory=Distillation)

    @property
    def frozen(self) -> tuple[Transformer, ...]:
        """The teacher."""
        return (self.teacher,)

    def __call__(
        self, model: Transformer, tokens: Tensor, prompt_lens: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the 1/p-weighted loss per noised token."""
        chosen = self.distillation
        noisy, blocks = _block_noise(chosen.noise, model, tokens, prompt_lens, generator)
        mask = (blocks[:, None, :] <= blocks[:, :, None])[:, None]  # [B, 1, T, T]
        if _uniform() < chosen.noise.stepped:
            noisy = _stepped(model, noisy, tokens, mask)
        hidden, _ = model(noisy.tokens, _positions(tokens), mask)
        logits, targets = _predictions(model, hidden, noisy.masked, tokens)
        loss = logits.new_zeros((), dtype=torch.float32)
        if chosen.data > 0:
            loss = loss + chosen.data * cross_entropy(logits, targets, _weight(noisy))
        if chosen.data < 1:
            loss = loss + self._divergence(logits, noisy, tokens, prompt_lens, generator)
        return loss / _num_noised(noisy, prompt_lens)

    def _divergence(
        self,
        logits: Tensor,
        noisy: Noisy,
        tokens: Tensor,
        prompt_lens: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the weighted divergences of the student's [N, V] logits from the teacher's."""
        weight, seen, masked = _weight(noisy), noisy, noisy.masked
        if self.distillation.teacher_input == "fresh":
            mask_id = self.teacher.config.mask_id
            seen = corrupt(tokens, prompt_lens, noisy.ratio, mask_id=mask_id, generator=generator)
            masked = noisy.masked & seen.masked
            both = masked[noisy.masked]
            # a position is masked in both with p * p, so this keeps the estimate unbiased
            logits, weight = logits[both], weight[both].square()
        with torch.no_grad():
            states, _ = self.teacher(seen.tokens, _positions(tokens), None)
            soft, _ = _predictions(self.teacher, states, masked, tokens)
        loss = logits.new_zeros((), dtype=torch.float32)
        if self.distillation.forward_kl:
            loss = loss + self.distillation.forward_kl * forward_kl(logits, soft, weight)
        if self.distillation.reverse_kl:
            loss = loss + self.distillation.reverse_kl * reverse_kl(logits, soft, weight)
        return loss


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
