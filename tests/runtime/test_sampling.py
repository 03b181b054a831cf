"""The sampler against plain fp64 numpy."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from d2f_runtime.kernels.sampling import draw, forbid, keep_nucleus, propose, score, temper

pytestmark = pytest.mark.torch

Array = npt.NDArray[np.float64]
ROWS, VOCAB = 64, 300


def random_logits(seed: int, scale: float = 4.0) -> torch.Tensor:
    return torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def distribution(logits: torch.Tensor) -> Array:
    exact = logits.double().numpy()
    weights = np.exp(exact - exact.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("scale", [0.1, 4.0, 40.0])
def test_scores_equal_the_reference(scale: float) -> None:
    logits = random_logits(1, scale)
    p = distribution(logits)
    ordered = np.sort(p, axis=-1)
    found = score(logits)
    assert found.token.tolist() == p.argmax(axis=-1).tolist()
    np.testing.assert_allclose(found.confidence, ordered[:, -1], atol=1e-6)
    np.testing.assert_allclose(found.margin, ordered[:, -1] - ordered[:, -2], atol=1e-6)
    entropy = (p * np.log(np.maximum(p, 1e-300))).sum(axis=-1)
    np.testing.assert_allclose(found.neg_entropy, entropy, atol=2e-5)


def test_forbidden_ids_carry_no_mass() -> None:
    logits = random_logits(2)
    logits[:, 7] = 500.0
    logits[:, 290:] = 400.0
    token, confidence, margin, neg_entropy = propose(forbid(logits, mask_id=7, num_tokens=290))
    allowed = np.delete(np.arange(VOCAB), [7, *range(290, VOCAB)])
    p = distribution(logits[:, allowed])
    assert token.tolist() == allowed[p.argmax(axis=-1)].tolist()
    np.testing.assert_allclose(confidence, p.max(axis=-1), atol=1e-6)
    assert torch.isfinite(margin).all()
    assert torch.isfinite(neg_entropy).all()


def test_a_certain_row_has_no_entropy() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 5] = 1e4
    token, confidence, margin, neg_entropy = propose(logits)
    values = (token.item(), confidence.item(), margin.item(), neg_entropy.item())
    assert values == (5, 1.0, 1.0, 0.0)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_draws_are_the_inverse_cdf(temperature: float) -> None:
    logits = random_logits(3)
    per_row = torch.full((ROWS,), temperature)
    uniforms = torch.rand(ROWS, generator=torch.Generator().manual_seed(4))
    token, confidence, _, _ = propose(temper(logits, per_row), per_row, uniforms)
    p = distribution(logits / temperature)
    cdf = p.cumsum(axis=-1)
    u = uniforms.double().numpy()
    wanted = (cdf <= u[:, None]).sum(axis=-1)
    clear = np.abs(cdf - u[:, None]).min(axis=-1) > 1e-6  # not within fp32 rounding of an edge
    assert clear.sum() > ROWS * 0.9
    assert token.numpy()[clear].tolist() == wanted[clear].tolist()
    drawn = p[np.arange(ROWS), token.numpy()]
    np.testing.assert_allclose(confidence, drawn, atol=1e-6)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(10_000, 4)
    uniforms = torch.arange(10_000) / 10_000
    counts = draw(score(logits), uniforms)[0].bincount()
    assert counts.tolist() == pytest.approx([1000, 2000, 3000, 4000], abs=2)


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2**-24, 1.0])
def test_the_ends_of_the_uniform_range_draw_allowed_ids(uniform: float) -> None:
    logits = forbid(random_logits(5), mask_id=0, num_tokens=200)
    ones = torch.ones(ROWS)
    token, confidence, _, _ = propose(logits, ones, ones * uniform)
    assert ((token > 0) & (token < 200)).all()
    assert (confidence > 0).all()


def test_rows_at_temperature_zero_stay_greedy_among_sampled_ones() -> None:
    logits = random_logits(6)
    per_row = torch.tensor([0.0, 1.0] * (ROWS // 2))
    found = propose(temper(logits, per_row), per_row, torch.full((ROWS,), 0.5))
    greedy = propose(logits)
    for mixed, best in zip(found, greedy, strict=True):
        assert mixed[::2].tolist() == best[::2].tolist()


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_nucleus_keeps_the_first_tokens_up_to_the_mass(top_p: float) -> None:
    logits = random_logits(7)
    kept = keep_nucleus(logits, torch.full((ROWS,), top_p)) == logits
    p = distribution(logits)
    for row in range(ROWS):
        order = np.argsort(-p[row])
        before = p[row][order].cumsum() - p[row][order]
        wanted = set(order[before <= top_p].tolist())
        assert set(kept[row].nonzero()[:, 0].tolist()) == wanted


def test_a_whole_nucleus_changes_nothing() -> None:
    logits = random_logits(8)
    assert torch.equal(keep_nucleus(logits, torch.ones(ROWS)), logits)
