from collections.abc import Callable

import numpy as np
import pytest
import torch

from d2f_export.distill.losses import cross_entropy, forward_kl, reverse_kl

pytestmark = pytest.mark.torch

Divergence = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def log_softmax(logits: torch.Tensor) -> Array:
    values = logits.detach().double().numpy()
    values = values - values.max(axis=-1, keepdims=True)
    shifted: Array = values - np.log(np.exp(values).sum(axis=-1, keepdims=True))
    return shifted


def random_logits(seed: int) -> torch.Tensor:
    return 4 * torch.randn(50, 37, generator=torch.Generator().manual_seed(seed))


def test_forward_kl_equals_the_definition_in_fp64() -> None:
    student, teacher = random_logits(0), random_logits(1)
    weight = torch.rand(50)
    log_q, log_p = log_softmax(teacher), log_softmax(student)
    expected = ((np.exp(log_q) * (log_q - log_p)).sum(-1) * weight.double().numpy()).sum()
    assert forward_kl(student, teacher, weight).item() == pytest.approx(expected, rel=1e-5)


def test_soft_label_cross_entropy_of_the_released_code_has_the_same_gradient() -> None:
    student = random_logits(0).requires_grad_()
    teacher, weight = random_logits(1), torch.rand(50)
    (kl,) = torch.autograd.grad(forward_kl(student, teacher, weight), student)
    soft = torch.nn.functional.cross_entropy(student, teacher.softmax(-1), reduction="none")
    (released,) = torch.autograd.grad((soft * weight).sum(), student)
    assert torch.allclose(kl, released, atol=1e-6)


def test_reverse_kl_equals_the_definition_in_fp64() -> None:
    student, teacher = random_logits(0), random_logits(1)
    weight = torch.rand(50)
    log_q, log_p = log_softmax(teacher), log_softmax(student)
    expected = ((np.exp(log_p) * (log_p - log_q)).sum(-1) * weight.double().numpy()).sum()
    assert reverse_kl(student, teacher, weight).item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_of_reverse_kl_is_that_of_the_definition_in_fp64() -> None:
    student, teacher = random_logits(0).requires_grad_(), random_logits(1)
    (gradient,) = torch.autograd.grad(reverse_kl(student, teacher, torch.ones(50)), student)
    log_q, log_p = log_softmax(teacher), log_softmax(student)
    p, surprise = np.exp(log_p), log_p - log_q  # d KL / d logit = p * (surprise - KL)
    expected = p * (surprise - (p * surprise).sum(-1, keepdims=True))
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-4, atol=1e-5)  # surprises of 20


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_no_gradient_reaches_the_teacher(divergence: Divergence) -> None:
    student, teacher = random_logits(0).requires_grad_(), random_logits(1).requires_grad_()
    divergence(student, teacher, torch.ones(50)).backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert teacher.grad is None


def test_cross_entropy_equals_the_definition_in_fp64() -> None:
    logits, weight = random_logits(0), torch.rand(50)
    targets = torch.arange(50) % 37
    picked = -log_softmax(logits)[np.arange(50), targets.numpy()]
    expected = (picked * weight.double().numpy()).sum()
    assert cross_entropy(logits, targets, weight).item() == pytest.approx(expected, rel=1e-5)
