"""What only a GPU can show: the fused attention, and a run in bf16."""

import json
from pathlib import Path

import pytest
import torch

from d2f_export.distill.attention import use_flex
from d2f_export.distill.corruption import BlockNoise, noise_generator
from d2f_export.distill.distiller import Distiller, Objective
from d2f_export.distill.feed import Batch
from d2f_export.distill.run import distill
from d2f_export.distill.settings import DistillSettings
from d2f_export.distill.student import add_lora, trainable
from tiny_models import CONFIGS, MASK, tiny_model

pytestmark = [
    pytest.mark.torch,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fused_attention_equals_the_dense_mask(family: str, checkpointing: bool) -> None:
    student = tiny_model(CONFIGS[family]).cuda().train()
    add_lora(student, rank=4, alpha=4.0, dropout=0.0)
    with torch.no_grad():
        for factor in trainable(student).values():
            factor.normal_(0, 0.1)
    use_flex(student, compiled=True)
    tokens = torch.randint(5, 140, (2, 200), generator=torch.Generator().manual_seed(0))
    given = Batch(tokens, torch.tensor([9, 70]))
    batch = BlockNoise().draw(given, noise_generator(0, 0, 0), mask_id=MASK)
    results = []
    for attention in ("dense", "flex"):
        distiller = Distiller(
            student,
            None,
            Objective(),
            attention=attention,
            checkpointing=checkpointing,
        )
        loss = distiller(batch.to(torch.device("cuda")))
        results.append((loss, torch.autograd.grad(loss, list(trainable(student).values()))))
    (dense, dense_gradients), (flex, flex_gradients) = results
    assert flex.item() == pytest.approx(dense.item(), rel=1e-3)  # its products may be tf32
    for one, other in zip(dense_gradients, flex_gradients, strict=True):
        assert (one - other).abs().max() <= 2e-2 * one.abs().max()


def test_a_run_in_bf16_validates_and_resumes(tmp_path: Path) -> None:
    from tiny_checkpoints import write_model

    write_model(tmp_path / "base", "llada")
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(
            json.dumps({"prompt": f"{n} and 4", "answer": f"{n + 4}."}) + "\n" for n in range(9)
        )
    )

    def run(steps: int, name: str) -> Path:
        chosen = DistillSettings(
            model=str(tmp_path / "base"), data=(str(data),), length=128, steps=steps, lr=1e-3,
            lora_rank=4, save_every=2, log_every=1, validation=str(data), validate_every=2,
            validation_examples=3, validation_tokens=12, validation_block_size=4,
        )  # fmt: skip
        return distill(chosen, tmp_path / name)

    whole = run(4, "whole")
    run(2, "parts")
    parts = run(4, "parts")
    losses = [
        [line.split(",")[3] for line in (p / "log.csv").read_text().split()] for p in (whole, parts)
    ]
    assert [float(x) for x in losses[1][1:]] == pytest.approx(
        [float(x) for x in losses[0][1:]], rel=1e-3
    )
    assert (whole / "adapter_config.json").is_file()
