from typing import Any

import pytest
import torch

from d2f_export.distill.memory import (
    GIB,
    check_fits,
    num_adapter_parameters,
    num_parameters,
    plan_memory,
)
from d2f_export.distill.settings import DistillSettings
from d2f_export.distill.student import add_lora, trainable
from d2f_runtime.models.transformer import Transformer
from d2f_stream.core.errors import InvalidRequest
from lab.bench.step_models import SHAPES
from tiny_models import CONFIGS

pytestmark = pytest.mark.torch


def settings(**changes: Any) -> DistillSettings:
    return DistillSettings(model="m", data=("d",), **changes)


def total(shape: str, **changes: Any) -> float:
    plan = plan_memory(SHAPES[shape], settings(**changes), is_bf16=True, is_flex=True)
    return plan.total / GIB


@pytest.mark.parametrize("family", list(CONFIGS))
def test_parameters_are_counted_exactly(family: str) -> None:
    pytest.importorskip("peft")
    with torch.device("meta"):
        model = Transformer(CONFIGS[family])
    assert num_parameters(CONFIGS[family]) == sum(p.numel() for p in model.parameters())
    model = Transformer(CONFIGS[family])
    add_lora(model, rank=3, alpha=3.0, dropout=0.0)
    counted = num_adapter_parameters(CONFIGS[family], 3)
    assert counted == sum(p.numel() for p in trainable(model).values())


def test_published_models_have_their_published_sizes() -> None:
    assert num_parameters(SHAPES["llada-8b"]) == pytest.approx(8.02e9, rel=1e-3)
    assert num_adapter_parameters(SHAPES["llada-8b"], 32) == 32 * 4 * 2 * 4096 * 32
    assert num_adapter_parameters(SHAPES["dream-7b"], 32) == pytest.approx(20.2e6, rel=1e-2)


def test_lora_of_8b_fits_a_gpu_of_80_gb_and_full_training_does_not() -> None:
    assert 16 < total("llada-8b") < 24
    check_fits(
        plan_memory(SHAPES["llada-8b"], settings(), is_bf16=True, is_flex=True),
        79 * GIB,
        settings(),
    )
    assert total("llada-8b", full=True) > 128  # 4 bytes of weights and gradients, 8 of moments
    assert total("dream-7b", full=True) > 110


def test_each_setting_moves_the_plan_its_way() -> None:
    base = total("llada-8b", length=4096)
    assert total("llada-8b", length=4096, checkpointing=False) > base + 10
    assert total("llada-8b", length=4096, micro_batch=4) > base + 2
    assert total("llada-8b", length=4096, logit_rows=4096) > base + 5
    assert total("llada-8b", length=512) < base
    assert total("llada-8b", length=512, validation="v", validation_rows=64) > base


def test_what_does_not_fit_is_refused_with_the_ways_out() -> None:
    chosen = settings(full=True, checkpointing=False, micro_batch=2, length=2048)
    plan = plan_memory(SHAPES["llada-8b"], chosen, is_bf16=True, is_flex=True)
    with pytest.raises(InvalidRequest) as error:
        check_fits(plan, 80 * GIB, chosen)
    text = str(error.value)
    assert "but the device has 80.0 GiB" in text
    for way in ("without --full", "checkpointing on", "micro_batch (now 2", "length (now 2048)"):
        assert way in text
