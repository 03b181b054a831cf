"""What a step of many rows takes at least."""

import pytest

import triton_mode  # noqa: F401  # isort: skip  # before the kernels

from lab.bench.step_models import SHAPES
from lab.bench.wide_steps import floor_ms

pytestmark = pytest.mark.torch


def test_arithmetic_grows_with_rows_and_reads_with_sessions() -> None:
    few, many = (floor_ms(SHAPES["llada-8b"], "bf16", 660, sessions) for sessions in (8, 64))
    # 7.5 G weights, twice, for each row; and four times 4,096 for each layer and key that it sees
    weights, keys = 660 * 2 * 7.498e9, 660 * 4 * 32 * 4096 * 722.5
    assert few["arithmetic"] == pytest.approx(1e3 * (weights + keys) / 989e12, rel=1e-3)
    # 56 times 640 tokens of 512 KiB
    more_bytes = 56 * 640 * 2**19
    assert many["read"] - few["read"] == pytest.approx(1e3 * more_bytes / 4.8e12, rel=1e-3)


def test_fp8_halves_the_arithmetic_of_products_alone() -> None:
    bf16, fp8 = (floor_ms(SHAPES["llada-8b"], name, 660, 16) for name in ("bf16", "fp8"))
    assert 0.5 < fp8["arithmetic"] / bf16["arithmetic"] < 0.52
