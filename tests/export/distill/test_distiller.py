"""The loss and its gradient against the published definition in fp64, on transformers' classes."""

import contextlib
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from d2f_export.distill.attention import use_flex
from d2f_export.distill.corruption import Corrupted, Corruption, noise_generator
from d2f_export.distill.distiller import Distiller, LossWeights
from d2f_export.distill.feed import Batch
from d2f_export.distill.student import add_lora, trainable
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_runtime.models.transformer import Transformer
from tiny_checkpoints import FAMILIES, added_tokens, additive, oracle, write_model

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.torch

LENGTH, PROMPT_LENS, BLOCK = 44, [9, 20], 8
SCALE = 2.0  # alpha over rank


@pytest.fixture(params=["llada", "Dream"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path, family: str) -> Path:
    write_model(tmp_path, family)
    return tmp_path


def lora_student(folder: Path) -> Transformer:
    """A student whose adapters do something: PEFT's fresh ones are zero."""
    student = load_checkpoint(folder)
    add_lora(student, rank=4, alpha=4 * SCALE, dropout=0.0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for factor in trainable(student).values():
            factor.copy_(torch.randn(factor.shape, generator=generator) * 0.2)
    return student


def corrupted(family: str, teacher_input: Literal["same", "fresh"] = "same") -> Corrupted:
    tokens = torch.randint(0, 280, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = FAMILIES[family].mask
    assert mask is not None
    mask_id = added_tokens(FAMILIES[family])[mask]
    corruption = Corruption("monotone", 0.2, 0.7, BLOCK, mask_id, teacher_input)
    return corruption.draw(Batch(tokens, torch.tensor(PROMPT_LENS)), noise_generator(0, 0, 0))


def visible() -> Tensor:
    """Who sees whom in the student, position by position."""

    def block(prompt_len: int, position: int) -> int:
        return -1 if position < prompt_len else (position - prompt_len) // BLOCK

    return torch.tensor(
        [
            [
                [block(p, column) <= block(p, row) for column in range(LENGTH)]
                for row in range(LENGTH)
            ]
            for p in PROMPT_LENS
        ]
    )


def aligned(model: Any, tokens: Tensor, sees: Tensor, *, shifted: bool) -> Tensor:
    """Logits of which row i is about position i; Dream's first row is constant, as published."""
    mask = torch.cat([additive(rows) for rows in sees]).double()
    logits: Tensor = model(input_ids=tokens, attention_mask=mask).logits
    if shifted:
        logits = torch.cat([torch.ones_like(logits[:, :1]), logits[:, :-1]], dim=1)
    return logits


def definition(
    teacher: Any, student: Any, batch: Corrupted, *, shifted: bool
) -> tuple[Tensor, Tensor]:
    """Return the released code's soft-label cross entropy over p, and the teacher's share of it."""
    everything = torch.ones(2, LENGTH, LENGTH, dtype=torch.bool)
    with torch.no_grad():
        soft = aligned(teacher, batch.teacher, everything, shifted=shifted)[batch.masked].softmax(
            -1
        )
    logits = aligned(student, batch.student, visible(), shifted=shifted)[batch.masked]
    ratio = batch.ratio[batch.masked].double()
    loss = (-(soft * logits.log_softmax(-1)).sum(-1) / ratio).mean()
    return loss, (-(soft * soft.log()).sum(-1) / ratio).mean()


def distiller(
    student: Transformer, teacher: Transformer | None = None, **options: Any
) -> Distiller:
    values: dict[str, Any] = {
        "weights": LossWeights(),
        "attention": "dense",
        "checkpointing": False,
    }
    return Distiller(student, teacher, **(values | options)).train()


@pytest.mark.parametrize("options", [{}, {"checkpointing": True, "logit_rows": 5}])
def test_loss_and_gradients_of_the_adapters_equal_the_definition(
    family: str, folder: Path, options: dict[str, Any]
) -> None:
    tiny, batch, ours = FAMILIES[family], corrupted(family), lora_student(folder)
    theirs = oracle(tiny).double()
    named = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, up in trainable(ours).items():
            if ".lora_B." in name:
                down = trainable(ours)[name.replace("lora_B", "lora_A")]
                weight = named[f"model.{name.partition('.lora_')[0]}.weight"]
                weight += SCALE * up.double() @ down.double()
    expected, entropy = definition(oracle(tiny).double(), theirs, batch, shifted=tiny.shifted)
    expected.backward()  # type: ignore[no-untyped-call]
    loss = distiller(ours, **options)(batch)
    loss.backward()
    assert loss.item() == pytest.approx((expected - entropy).item(), rel=1e-4)
    for name, factor in trainable(ours).items():
        gradient = named[f"model.{name.partition('.lora_')[0]}.weight"].grad
        assert factor.grad is not None
        if ".lora_A." in name:  # the chain rule through W + scale B A
            other = trainable(ours)[name.replace("lora_A", "lora_B")].double()
            wanted = SCALE * other.T @ gradient
        else:
            other = trainable(ours)[name.replace("lora_B", "lora_A")].double()
            wanted = SCALE * gradient @ other.T
        assert (factor.grad - wanted).abs().max() <= 1e-3 * wanted.abs().max()  # fp32 against fp64


def test_gradients_of_all_weights_equal_the_definition(family: str, folder: Path) -> None:
    tiny, batch = FAMILIES[family], corrupted(family)
    ours, teacher = load_checkpoint(folder), load_checkpoint(folder).requires_grad_(False)
    with torch.no_grad():  # else teacher and student differ by what they see only
        for parameter in ours.parameters():
            parameter.mul_(1.1)
    theirs = oracle(tiny).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(1.1)
    expected, entropy = definition(oracle(tiny).double(), theirs, batch, shifted=tiny.shifted)
    expected.backward()  # type: ignore[no-untyped-call]
    loss = distiller(ours, teacher)(batch)
    loss.backward()
    assert loss.item() == pytest.approx((expected - entropy).item(), rel=1e-4)
    named = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        wanted = named[name if name.startswith("lm_head") else f"model.{name}"].grad
        assert weight.grad is not None
        assert (weight.grad - wanted).abs().max() <= 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("teacher_input", ["same", "fresh"])
def test_mixtures_add_up(
    family: str, folder: Path, teacher_input: Literal["same", "fresh"]
) -> None:
    batch, student = corrupted(family, teacher_input), lora_student(folder)
    names = ("forward_kl", "reverse_kl", "cross_entropy")
    parts = [
        distiller(student, weights=LossWeights(**{n: float(n == m) for n in names}))(batch).item()
        for m in names
    ]
    mixed = distiller(student, weights=LossWeights(0.5, 2.0, 0.25))(batch).item()
    assert len(set(parts)) == 3
    assert mixed == pytest.approx(0.5 * parts[0] + 2.0 * parts[1] + 0.25 * parts[2], rel=1e-5)


def test_cross_entropy_alone_runs_no_teacher(folder: Path, family: str) -> None:
    student = lora_student(folder)
    layer = student.layers[0]
    calls: list[int] = []
    with contextlib.closing(_Hook(layer, calls)):
        distiller(student, weights=LossWeights(0.0, 0.0, 1.0))(corrupted(family))
    assert len(calls) == 1


class _Hook:
    def __init__(self, layer: torch.nn.Module, calls: list[int]) -> None:
        self._handle = layer.register_forward_hook(lambda *_: calls.append(1))

    def close(self) -> None:
        self._handle.remove()


def test_a_batch_without_masks_has_no_loss_and_a_gradient(folder: Path, family: str) -> None:
    batch, student = corrupted(family), lora_student(folder)
    batch.masked.fill_(False)
    loss = distiller(student)(batch)
    loss.backward()
    assert loss.item() == 0.0


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let flex_attention run unfused with gradients, which it refuses on a CPU."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)


@pytest.mark.usefixtures("flex_on_cpu")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's tracer reads it
def test_flex_attention_equals_the_dense_mask(family: str, folder: Path) -> None:
    batch, student = corrupted(family), lora_student(folder)
    use_flex(student, compiled=False)
    losses, gradients = [], []
    for attention in ("dense", "flex"):
        loss = distiller(student, attention=attention)(batch)
        gradients.append(torch.autograd.grad(loss, list(trainable(student).values())))
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for dense, flex in zip(*gradients, strict=True):
        assert (dense - flex).abs().max() <= 1e-4 * dense.abs().max()
