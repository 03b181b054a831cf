"""The benchmark of mixtures: its floors, and that no part's failure hides another."""

from typing import Any

import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from lab.bench.mixture import MixtureSettings, time_mixtures  # noqa: E402
from lab.bench.mixture_steps import floors  # noqa: E402


def test_floors_are_the_experts_that_rows_choose() -> None:
    found = floors(MixtureSettings())
    one, all_of_them = found["bf16, 1 rows"], found["bf16, 256 rows"]
    assert one["experts"] == 8.0
    expert = 3 * 2048 * 512 * 2 / 1e9
    assert all_of_them["gb"] - one["gb"] == pytest.approx(19 * 247.9 * expert, rel=1e-3)
    assert found["nf4, 256 rows"]["gb"] < found["fp8, 256 rows"]["gb"] < all_of_them["gb"]


def test_steps_are_timed_where_no_kernel_runs() -> None:
    noted: list[dict[str, Any]] = []
    settings = MixtureSettings(
        shape="tiny-mixture", quantizations=("bf16", "nf4"), device="cpu", cached=64, widths=(3, 40)
    )
    results = time_mixtures(settings, noted.append)
    assert noted
    for quantization in ("bf16", "nf4"):
        steps = results[f"steps {quantization}"]
        assert steps["3 rows"]["experts"] <= 6.0
        assert steps["3 rows"]["experts"] < steps["40 rows"]["experts"] == 8.0
