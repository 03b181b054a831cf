from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from triton_mode import DEVICE  # isort: skip  # before the kernels

from d2f_runtime.backends.kernel_trial import BOUND, BOUND_FP8, TINY, TINY_MIXTURE, trial
from d2f_runtime.kernels.activation import Activation
from d2f_runtime.models.fast_transformer import KERNELS, REFERENCES

pytestmark = pytest.mark.torch

CPU = torch.device("cpu")
BOUNDS = {"bf16": BOUND, "fp8": BOUND_FP8}


def off(stage: Callable[..., Any]) -> Callable[..., Any]:
    """Let a stage's rows be off by their last one, as a wrong index makes them."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        found = stage(*args, **kwargs)
        if isinstance(found, Activation):
            return found._replace(values=found.values.roll(1, dims=0))
        return found.roll(1, dims=0)

    return wrong


@pytest.mark.parametrize("config", [TINY, TINY_MIXTURE])
@pytest.mark.parametrize("quantization", list(BOUNDS))
def test_what_is_right_passes(quantization: str, config: Any) -> None:
    assert trial(CPU, quantization, REFERENCES, config) < BOUNDS[quantization] / 2


@pytest.mark.parametrize("quantization", ["bf16", "nf4"])
def test_wrong_experts_are_found(quantization: str) -> None:
    def wrong(*given: Any) -> Any:
        return REFERENCES.through_experts(*given).roll(1, dims=1)

    broken = replace(REFERENCES, through_experts=wrong)
    assert not trial(CPU, quantization, broken, TINY_MIXTURE) < BOUND


@pytest.mark.parametrize("quantization", list(BOUNDS))
@pytest.mark.parametrize("stage", ["rotate_and_store", "attend", "silu_gate"])
def test_a_wrong_stage_is_found(quantization: str, stage: str) -> None:
    broken = replace(REFERENCES, **{stage: off(getattr(REFERENCES, stage))})
    assert not trial(CPU, quantization, broken) < BOUNDS[quantization]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("config", [TINY, TINY_MIXTURE])
@pytest.mark.parametrize("quantization", [*BOUNDS, "nf4"])
def test_this_gpu_passes(quantization: str, config: Any) -> None:
    bound = BOUNDS.get(quantization, BOUND)
    assert trial(torch.device("cuda:0"), quantization, KERNELS, config) < bound / 2
