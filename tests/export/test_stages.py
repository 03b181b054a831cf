"""What the student's objective asks of student and teacher, against its definition."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from d2f_export.embedded_model.recipe import RECIPES
from d2f_export.stages import Distillation, NoiseSettings, StudentObjective, TeacherObjective
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.transformer import Transformer

pytestmark = pytest.mark.torch

CONFIG = replace(RECIPES["tiny"].config, vocab_size=64, num_tokens=64)
TOKENS = torch.randint(2, 60, (6, 48), generator=torch.Generator().manual_seed(1))
PROMPT_LENS = torch.tensor([5, 9, 16, 7, 12, 20])
ANSWER = torch.arange(48)[None] >= PROMPT_LENS[:, None]
HALF = NoiseSettings(low=0.5, high=0.5, schedules=("random",), block_sizes=(48,))


class Watched(Transformer):
    """Remembers what it saw last."""

    seen: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.register_forward_pre_hook(lambda _, arguments: setattr(self, "seen", arguments[0]))

    def predictions(self) -> Tensor:
        """Return [B, T, V] fp64 logits for what it saw last, full attention, aligned."""
        positions = torch.arange(self.seen.shape[1])[None]
        logits = self.logits(self(self.seen, positions, None)[0]).double()
        return torch.cat([logits[:, :1], logits[:, :-1]], dim=1)


def pair() -> tuple[Watched, Watched]:
    student, teacher = Watched(CONFIG), Watched(CONFIG)
    student.init_weights(0)
    teacher.init_weights(1)
    return student, teacher.requires_grad_(False)


def loss(distillation: Distillation, student: Watched, teacher: Watched, seed: int = 0) -> float:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(seed)
    objective = StudentObjective(teacher, distillation)
    return objective(student, TOKENS, PROMPT_LENS, generator).item()


@pytest.mark.parametrize("teacher_input", ["same", "fresh"])
def test_divergence_over_ratio_equals_its_definition_in_fp64(teacher_input: str) -> None:
    """The answer is one block, and the prompt is known, so only its rows differ from full."""
    student, teacher = pair()
    chosen = Distillation(HALF, teacher_input=teacher_input)  # type: ignore[arg-type]
    value = loss(chosen, student, teacher)
    both = (student.seen == CONFIG.mask_id) & (teacher.seen == CONFIG.mask_id)
    weight = 1 / 0.5 if teacher_input == "same" else 1 / 0.5**2
    log_q = F.log_softmax(teacher.predictions(), dim=-1)
    blocks = torch.where(ANSWER, 0, -1)
    mask = (blocks[:, None, :] <= blocks[:, :, None])[:, None]
    states, _ = student(student.seen, torch.arange(48)[None], mask)
    logits = student.logits(states).double()
    log_p = F.log_softmax(torch.cat([logits[:, :1], logits[:, :-1]], dim=1), dim=-1)
    divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
    expected = weight * divergence[both].sum() / ANSWER.sum()
    assert value == pytest.approx(expected.item(), rel=1e-4)


def test_the_teacher_sees_the_students_sequence_or_another_draw_of_masks() -> None:
    student, teacher = pair()
    loss(Distillation(HALF), student, teacher)
    assert torch.equal(student.seen, teacher.seen)
    loss(Distillation(HALF, teacher_input="fresh"), student, teacher)
    assert not torch.equal(student.seen, teacher.seen)
    for seen in (student.seen, teacher.seen):
        assert torch.equal(seen[~ANSWER], TOKENS[~ANSWER])
        share = (seen == CONFIG.mask_id)[ANSWER].float().mean()
        assert 0.35 < share < 0.65  # 219 positions; five standard deviations are 0.17


def test_shares_of_the_loss_add_up() -> None:
    student, teacher = pair()
    alone = (
        Distillation(HALF),
        Distillation(HALF, forward_kl=0.0, reverse_kl=1.0),
        Distillation(HALF, forward_kl=0.0, data=1.0),
    )
    forward, reverse, data = (loss(distillation, student, teacher) for distillation in alone)
    mixed = Distillation(HALF, forward_kl=0.5, reverse_kl=0.2, data=0.3)
    expected = 0.5 * forward + 0.2 * reverse + 0.3 * data
    assert len({forward, reverse, data}) == 3
    assert loss(mixed, student, teacher) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shares", [{"data": 0.3}, {"forward_kl": 1.5, "data": -0.5}])
def test_shares_that_make_no_whole_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"the loss's shares are .* must add up to 1"):
        Distillation(**shares)  # type: ignore[arg-type]


def test_a_student_by_data_alone_needs_no_teacher() -> None:
    student, teacher = pair()
    loss(Distillation(HALF, forward_kl=0.0, data=1.0), student, teacher)
    assert not hasattr(teacher, "seen")


@pytest.mark.parametrize(("block_share", "sees_blocks"), [(0.0, False), (1.0, True)])
def test_share_of_block_noise_in_the_teachers_batches(
    block_share: float, sees_blocks: bool
) -> None:
    """Block noise here masks all of the answer, which uniform ratios below 1 do not."""
    _, teacher = pair()
    everything = NoiseSettings(low=1.0, high=1.0)
    TeacherObjective(everything, block_share)(
        teacher.requires_grad_(), TOKENS, PROMPT_LENS, torch.Generator().manual_seed(0)
    )
    assert bool((teacher.seen == CONFIG.mask_id)[ANSWER].all()) == sees_blocks
