import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2f_export.distill.corruption import (
    BlockNoise,
    Corrupted,
    block_indices,
    block_ratios,
    draw_masks,
    noise_generator,
    uniform_ratios,
)
from d2f_export.distill.feed import Batch
from lab.embedded_model.next_token import NextToken

pytestmark = pytest.mark.torch

MASK = 3
PROMPT_LENS = torch.tensor([5, 40])


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
    noise = BlockNoise(("random",), (8,), low=ratio, high=ratio)
    noisy = noise.draw(Batch(tokens, prompt_lens), generator(seed), mask_id=1)
    prompt = torch.arange(30)[None] < prompt_lens[:, None]
    assert not noisy.masked[prompt].any()
    assert torch.equal(noisy.noisy == 1, noisy.masked)
    assert torch.equal(noisy.noisy[~noisy.masked], tokens[~noisy.masked])
    assert noisy.clean is tokens


def test_masked_share_follows_the_ratio() -> None:
    ratio = torch.linspace(0, 1, 200)[:, None]
    masked = draw_masks(torch.zeros(200, 100), ratio, generator())
    error = masked.float().mean(dim=1) - ratio[:, 0]
    assert error.abs().max() < 0.2  # five standard deviations of a mean of 100 draws at one half
    assert abs(error.mean().item()) < 0.01


def test_uniform_ratios_are_stratified() -> None:
    ratios = uniform_ratios(100, 0.02, generator())[:, 0].sort().values
    assert (ratios.diff() < 0.02).all()
    assert ratios.min() >= 0.02


def draw(noise: BlockNoise | NextToken, seed: int = 0) -> Corrupted:
    tokens = torch.arange(10, 2010).view(2, 1000) % 500 + 10
    return noise.draw(Batch(tokens, PROMPT_LENS), noise_generator(seed, 0, 0), mask_id=MASK)


def test_ratios_are_constant_in_a_block_monotone_and_within_their_range() -> None:
    batch = draw(BlockNoise())
    for row, prompt_len in enumerate(PROMPT_LENS.tolist()):
        ratio, blocks = batch.ratio[row, prompt_len:], batch.blocks[row, prompt_len:]
        assert blocks.equal(torch.arange(len(blocks)) // 16)
        assert (ratio.diff() >= 0).all()
        assert (ratio.diff()[(torch.arange(1, len(ratio)) % 16) != 0] == 0).all()
        assert ratio.min() >= 0.2
        assert ratio.max() <= 0.7 + 1e-6


def test_noise_is_a_function_of_seed_batch_and_process() -> None:
    assert torch.equal(draw(BlockNoise(), 1).noisy, draw(BlockNoise(), 1).noisy)
    seeds = {
        noise_generator(s, i, r).initial_seed() for s in (0, 1) for i in (0, 1) for r in (0, 1)
    }
    assert len(seeds) == 8


def test_next_token_asks_for_the_whole_answer_and_masks_nothing() -> None:
    batch = draw(NextToken())
    assert torch.equal(batch.noisy, batch.clean)
    assert torch.equal(batch.masked, torch.arange(1000)[None] >= PROMPT_LENS[:, None])
    assert (batch.ratio == 1).all()


def test_a_batch_has_one_of_the_schedules_and_of_the_block_sizes() -> None:
    noise = BlockNoise(("monotone", "ramp"), (8, 32), low=0.2, high=0.7)
    kinds = set()
    for seed in range(24):
        batch = draw(noise, seed)
        size = int((batch.blocks[0] == 0).sum())
        kinds.add((size, bool(batch.ratio.max() > 0.71)))  # a ramp goes to 1, or stays at 0
    assert {size for size, _ in kinds} == {8, 32}
    assert {is_ramp for _, is_ramp in kinds} == {True, False}


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, {False}), (0.5, {True, False}), (1.0, {True})]
)
def test_share_of_batches_with_uniform_masks_and_of_those_with_a_step(
    share: float, expected: set[bool]
) -> None:
    """Block noise masks all of the answer here, which uniform ratios below 1 do not."""
    noise = BlockNoise(("random",), low=1.0, high=1.0, uniform=share, stepped=share)
    batches = [draw(noise, seed) for seed in range(16)]
    answers = PROMPT_LENS.new_tensor(2000) - PROMPT_LENS.sum()
    assert {bool(batch.masked.sum() < answers) for batch in batches} == expected
    assert {batch.threshold is not None for batch in batches} == expected
    assert all(0.5 <= batch.threshold < 0.99 for batch in batches if batch.threshold is not None)
