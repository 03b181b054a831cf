"""What twin, teacher and student of the embedded model learn from, against its definition."""

import msgspec
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from d2f_export.distill.corruption import BlockNoise, Corrupted
from d2f_export.distill.distiller import Distiller, LossWeights, Objective
from d2f_export.distill.feed import Batch
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.transformer import Transformer
from d2f_stream.core.errors import InvalidParams
from lab.embedded_model.recipe import RECIPES, StageSettings

pytestmark = pytest.mark.torch

RECIPE = RECIPES["tiny"]
SMALL = {"vocab_size": 64, "num_tokens": 64}
PROMPT_LENS = torch.tensor([5, 9, 16, 7, 12, 20])
ANSWER = torch.arange(48)[None] >= PROMPT_LENS[:, None]
HALF = BlockNoise(("random",), (48,), low=0.5, high=0.5)


def model(seed: int, config: TransformerConfig = RECIPE.config) -> Transformer:
    made = Transformer(TransformerConfig(**(config.to_dict() | SMALL)))
    made.init_weights(seed)
    with torch.no_grad():
        for weight in made.parameters():  # so that predictions differ, and some are confident
            weight.mul_(8 if weight.dim() > 1 else 1)
    return made


def batch() -> Batch:
    tokens = torch.randint(2, 60, (6, 48), generator=torch.Generator().manual_seed(1))
    return Batch(tokens, PROMPT_LENS)


def distiller(objective: Objective, student: Transformer, teacher: Transformer) -> Distiller:
    return Distiller(student, teacher, objective, attention="dense", logit_rows=50)


def log_predictions(network: Transformer, tokens: Tensor, sees: Tensor) -> Tensor:
    """Return [B, T, V] fp64 log-probabilities, of which row i is about position i."""
    states, _ = network(tokens, torch.arange(48)[None], sees)
    logits = network.logits(states).double()
    return F.log_softmax(torch.cat([logits[:, :1], logits[:, :-1]], dim=1), dim=-1)


def whole(rows: int = 48) -> Tensor:
    return torch.ones(6, 1, rows, rows, dtype=torch.bool)


def by_block(drawn: Corrupted) -> Tensor:
    return (drawn.blocks[:, None, :] <= drawn.blocks[:, :, None])[:, None]


def test_a_students_loss_is_the_divergence_over_the_ratio_for_each_token_of_the_answer() -> None:
    student, teacher = model(0), model(1)
    trained = distiller(Objective(HALF, mean_over="answer"), student, teacher)
    drawn = trained.draw(batch(), torch.Generator().manual_seed(0))
    log_q = log_predictions(teacher, drawn.noisy, whole())
    log_p = log_predictions(student, drawn.noisy, by_block(drawn))
    divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
    expected = divergence[drawn.masked].sum() / 0.5 / ANSWER.sum()
    assert trained(drawn).item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_teachers_loss_is_the_cross_entropy_over_the_ratio_with_all_in_sight() -> None:
    network = model(0)
    trained = distiller(RECIPE.objective("teacher", uniform=1.0), network, model(1))
    drawn = trained.draw(batch(), torch.Generator().manual_seed(0))
    assert len(set(drawn.ratio[:, 0].tolist())) == 6
    assert (drawn.ratio == drawn.ratio[:, :1]).all()
    log_p = log_predictions(network, drawn.noisy, whole())
    entropy = -log_p.gather(2, drawn.clean[..., None])[..., 0] / drawn.ratio.clamp(min=0.05)
    expected = entropy[drawn.masked].sum() / ANSWER.sum()
    assert trained(drawn).item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_twins_loss_is_the_cross_entropy_of_each_token_after_those_before_it() -> None:
    twin = model(0, RECIPE.twin_config)
    trained = distiller(RECIPE.objective("twin"), twin, model(1))
    drawn = trained.draw(batch(), torch.Generator().manual_seed(0))
    log_p = log_predictions(twin, batch().tokens, whole().tril())
    expected = -log_p.gather(2, batch().tokens[..., None])[..., 0][ANSWER].mean()
    assert trained(drawn).item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_step_before_the_loss_fills_what_is_right_with_confidence() -> None:
    student, teacher = model(0), model(1)
    data = LossWeights(forward_kl=0.0, cross_entropy=1.0)
    trained = distiller(Objective(HALF, data, mean_over="answer"), student, teacher)
    drawn = trained.draw(batch(), torch.Generator().manual_seed(0))
    first = log_predictions(student, drawn.noisy, by_block(drawn)).exp().max(-1)
    num_masked = int(drawn.masked.sum())
    below, above = first.values[drawn.masked].sort().values[[num_masked // 2 - 1, num_masked // 2]]
    threshold = ((below + above) / 2).item()  # no confidence is so near that rounding decides
    clean = torch.where(drawn.masked & (torch.arange(48) % 2 == 0), first.indices, drawn.clean)
    drawn = Corrupted(clean, drawn.noisy, drawn.masked, drawn.ratio, drawn.blocks, threshold)
    filled = drawn.masked & (first.values > threshold) & (first.indices == clean)
    left = drawn.masked & ~filled
    assert 10 < filled.sum() < drawn.masked.sum() - 10
    noisy = torch.where(left, drawn.noisy, clean)
    log_p = log_predictions(student, noisy, by_block(drawn))
    entropy = -log_p.gather(2, clean[..., None])[..., 0]
    expected = entropy[left].sum() / 0.5 / ANSWER.sum()
    assert trained(drawn).item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_student_equal_to_its_teacher_pays_only_for_what_it_cannot_see() -> None:
    """With one block over everything the sights are the same, and the divergence is zero."""
    student = model(0)
    trained = distiller(Objective(HALF, mean_over="answer"), student, student)
    drawn = trained.draw(batch(), torch.Generator().manual_seed(0))
    everything = torch.zeros_like(drawn.blocks)
    same = Corrupted(drawn.clean, drawn.noisy, drawn.masked, drawn.ratio, everything)
    assert trained(same).item() == pytest.approx(0.0, abs=1e-5)
    assert trained(drawn).item() > 1e-3


def test_settings_of_a_stage_are_checked() -> None:
    with pytest.raises(InvalidParams, match="tokens_per_batch is 0 but must be int >= 1"):
        StageSettings(stage="twin", tokens_per_batch=0)
    with pytest.raises(InvalidParams, match="lr is -1"):
        msgspec.structs.replace(RECIPE.student, lr=-1.0)
