import pytest
import torch

from d2f_export.distill.corruption import Corrupted, Corruption, noise_generator
from d2f_export.distill.feed import Batch

pytestmark = pytest.mark.torch

MASK = 3
PROMPT_LENS = torch.tensor([5, 40])


def draw(teacher_input: str = "same", schedule: str = "monotone", seed: int = 0) -> Corrupted:
    tokens = torch.arange(10, 2010).view(2, 1000) % 500 + 10
    corruption = Corruption(schedule, 0.2, 0.7, 16, MASK, teacher_input)  # type: ignore[arg-type]
    return corruption.draw(Batch(tokens, PROMPT_LENS), noise_generator(seed, 0, 0))


@pytest.mark.parametrize("schedule", ["monotone", "random"])
@pytest.mark.parametrize("teacher_input", ["same", "fresh"])
def test_prompts_are_never_masked_and_the_rest_is_data(schedule: str, teacher_input: str) -> None:
    batch = draw(teacher_input, schedule)
    for noisy in (batch.student, batch.teacher):
        masks = noisy == MASK
        assert torch.equal(noisy[~masks], batch.clean[~masks])
        assert not masks[0, :5].any()
        assert not masks[1, :40].any()
    assert ((batch.student == MASK) & (batch.teacher == MASK)).equal(batch.masked)
    assert torch.equal(batch.student, batch.teacher) == (teacher_input == "same")


def test_ratios_are_constant_in_a_block_monotone_and_within_their_range() -> None:
    batch = draw()
    for row, prompt_len in enumerate(PROMPT_LENS.tolist()):
        ratio, blocks = batch.ratio[row, prompt_len:], batch.blocks[row, prompt_len:]
        assert blocks.equal(torch.arange(len(blocks)) // 16)
        assert (ratio.diff() >= 0).all()
        assert (ratio.diff()[(torch.arange(1, len(ratio)) % 16) != 0] == 0).all()
        assert ratio.min() >= 0.2
        assert ratio.max() <= 0.7 + 1e-6


def test_noise_is_a_function_of_seed_batch_and_process() -> None:
    assert torch.equal(draw(seed=1).student, draw(seed=1).student)
    seeds = {
        noise_generator(s, i, r).initial_seed() for s in (0, 1) for i in (0, 1) for r in (0, 1)
    }
    assert len(seeds) == 8
