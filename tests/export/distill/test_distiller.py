"""The loss and its gradient against the published definition in fp64, on transformers' classes."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from d2f_export.distill.attention import use_flex
from d2f_export.distill.corruption import BlockNoise, Corrupted, noise_generator
from d2f_export.distill.distiller import Distiller, LossWeights, Objective
from d2f_export.distill.feed import Batch
from d2f_export.distill.student import add_lora, trainable
from d2f_export.distill.trainer import sharded_precision
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_runtime.models.transformer import Transformer
from tiny_checkpoints import FAMILIES, added_tokens, additive, oracle, write_model
from tiny_models import CONFIGS, tiny_model

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


def lora_student(folder: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """A student whose adapters do something: PEFT's fresh ones are zero."""
    student = load_checkpoint(folder, dtype=dtype)
    add_lora(student, rank=4, alpha=4 * SCALE, dropout=0.0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for factor in trainable(student).values():
            factor.copy_(torch.randn(factor.shape, generator=generator) * 0.2)
    return student


def corrupted(family: str) -> Corrupted:
    tokens = torch.randint(0, 280, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = FAMILIES[family].mask
    assert mask is not None
    mask_id = added_tokens(FAMILIES[family])[mask]
    given = Batch(tokens, torch.tensor(PROMPT_LENS))
    noise = BlockNoise(block_sizes=(BLOCK,))
    return noise.draw(given, noise_generator(0, 0, 0), mask_id=mask_id)


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
        soft = aligned(teacher, batch.noisy, everything, shifted=shifted)[batch.masked].softmax(-1)
    logits = aligned(student, batch.noisy, visible(), shifted=shifted)[batch.masked]
    ratio = batch.ratio[batch.masked].double()
    loss = (-(soft * logits.log_softmax(-1)).sum(-1) / ratio).mean()
    return loss, (-(soft * soft.log()).sum(-1) / ratio).mean()


def distiller(
    student: Transformer,
    teacher: Transformer | None = None,
    *,
    objective: Objective | None = None,
    **options: Any,
) -> Distiller:
    values: dict[str, Any] = {"attention": "dense", "checkpointing": False}
    return Distiller(student, teacher, objective or Objective(), **(values | options)).train()


def of(*weights: float) -> Objective:
    return Objective(weights=LossWeights(*weights))


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


def test_mixtures_add_up(family: str, folder: Path) -> None:
    batch, student = corrupted(family), lora_student(folder)
    alone = [of(1.0, 0.0, 0.0), of(0.0, 1.0, 0.0), of(0.0, 0.0, 1.0)]
    parts = [distiller(student, objective=objective)(batch).item() for objective in alone]
    mixed = distiller(student, objective=of(0.5, 2.0, 0.25))(batch).item()
    assert len(set(parts)) == 3
    assert mixed == pytest.approx(0.5 * parts[0] + 2.0 * parts[1] + 0.25 * parts[2], rel=1e-5)


def test_cross_entropy_alone_runs_no_teacher(folder: Path, family: str) -> None:
    student = lora_student(folder)
    layer = student.layers[0]
    calls: list[int] = []
    with contextlib.closing(_Hook(layer, calls)):
        distiller(student, objective=of(0.0, 0.0, 1.0))(corrupted(family))
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


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone, which FSDP shards over as over many."""
    meeting = f"file://{tmp_path / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # keys and values are views
def test_shards_in_bf16_compute_what_a_whole_model_does(family: str, folder: Path) -> None:
    batch = corrupted(family)
    whole = distiller(lora_student(folder, torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        expected = whole(batch)
    expected.backward()
    sharded = distiller(lora_student(folder, torch.bfloat16))
    angles: list[torch.dtype] = []
    for layer in sharded.student.layers:
        fully_shard(layer, mp_policy=sharded_precision(is_bf16=True))
        layer.self_attn.register_forward_pre_hook(  # type: ignore[union-attr]
            lambda _, given: angles.append(given[1][0].dtype)
        )
    fully_shard(sharded, mp_policy=sharded_precision(is_bf16=True))
    for checkpointing in (True, False):
        sharded.checkpointing = checkpointing
        angles.clear()
        sharded.zero_grad(set_to_none=True)
        loss = sharded(batch)
        loss.backward()
        num_forwards = 3 if checkpointing else 2  # teacher, student, student again
        assert angles == [torch.float32] * num_forwards * len(sharded.student.layers)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        wanted = trainable(whole)
        for name, factor in trainable(sharded).items():
            gradient, other = factor.grad, wanted[name].grad
            assert isinstance(gradient, DTensor)
            assert other is not None
            assert (gradient.full_tensor() - other).abs().max() <= 1e-3 * other.abs().max()


def test_a_tied_head_is_tied_again_after_a_move() -> None:
    """accelerate moves a model to the meta device before FSDP shards it."""
    config = next(config for config in CONFIGS.values() if config.tie_embeddings)
    student, teacher = tiny_model(config), tiny_model(config)
    moved = distiller(student, teacher).to("meta")
    assert student.lm_head.weight is not student.embed_tokens.weight
    moved.tie_weights()
    for model in (student, teacher):
        assert model.lm_head.weight is model.embed_tokens.weight
