import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2f_export.noise import block_indices, block_ratios, corrupt, uniform_ratios

pytestmark = pytest.mark.torch


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    schedule=st.sampled_from(["monotone", "ramp"]),
    num_blocks=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)
def test_monotone_schedules_never_fall_and_stay_in_range(
    schedule: str, num_blocks: int, seed: int
) -> None:
    ratios = block_ratios(schedule, 8, num_blocks, generator(seed))  # type: ignore[arg-type]
    high = 0.7 if schedule == "monotone" else 1.0
    assert (ratios.diff(dim=1) >= 0).all()
    assert (ratios >= 0).all()
    assert (ratios <= high + 1e-6).all()


def test_published_schedule_starts_uniformly_and_spreads_half_of_what_is_left() -> None:
    ratios = block_ratios("monotone", 20_000, 12, generator())
    first = ratios[:, 0]
    assert first.min() >= 0.2
    assert abs(first.mean().item() - 0.45) < 0.01
    # increments are iid U(0, (high - first) / (K - 1)), so the last block gains half of the rest
    gained = (ratios[:, -1] - first) / (0.7 - first)
    assert abs(gained.mean().item() - 0.5) < 0.01


def test_ramp_passes_through_clean_partial_and_fully_masked_blocks() -> None:
    ratios = block_ratios("ramp", 2_000, 8, generator())
    assert (ratios == 0).any()
    assert (ratios == 1).any()
    assert ((ratios > 0) & (ratios < 1)).any()


def test_random_schedule_is_not_monotone() -> None:
    ratios = block_ratios("random", 100, 8, generator())
    assert (ratios.diff(dim=1) < 0).any()


def test_grid_starts_at_the_end_of_each_prompt() -> None:
    blocks = block_indices(torch.tensor([2, 3]), 8, 3)
    assert blocks.tolist() == [[-1, -1, 0, 0, 0, 1, 1, 1], [-1, -1, -1, 0, 0, 0, 1, 1]]


@given(seed=st.integers(0, 2**31), ratio=st.floats(0, 1))
def test_prompt_is_never_masked_and_masks_are_where_they_are_said_to_be(
    seed: int, ratio: float
) -> None:
    tokens = torch.randint(2, 50, (4, 30), generator=generator(seed))
    prompt_lens = torch.tensor([1, 5, 10, 30])
    noisy = corrupt(
        tokens, prompt_lens, torch.full((4, 1), ratio), mask_id=1, generator=generator(seed)
    )
    prompt = torch.arange(30)[None] < prompt_lens[:, None]
    assert not noisy.masked[prompt].any()
    assert torch.equal(noisy.tokens == 1, noisy.masked)
    assert torch.equal(noisy.tokens[~noisy.masked], tokens[~noisy.masked])


def test_masked_share_follows_the_ratio() -> None:
    tokens = torch.full((200, 100), 5)
    ratio = torch.linspace(0, 1, 200)[:, None]
    noisy = corrupt(tokens, torch.zeros(200), ratio, mask_id=1, generator=generator())
    error = noisy.masked.float().mean(dim=1) - ratio[:, 0]
    assert error.abs().max() < 0.2  # five standard deviations of a mean of 100 draws at one half
    assert abs(error.mean().item()) < 0.01


def test_uniform_ratios_are_stratified() -> None:
    ratios = uniform_ratios(100, 0.02, generator())[:, 0].sort().values
    assert (ratios.diff() < 0.02).all()
    assert ratios.min() >= 0.02
