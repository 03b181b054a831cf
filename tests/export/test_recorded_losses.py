"""The losses of short trainings are those that were recorded; recorded_losses.py says of what."""

import json
import statistics
from pathlib import Path

import pytest

from recorded_losses import EXACT, MIXED, RECORD, SEEDS

pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft and accelerate of several ages
]

LOSSES: dict[str, list[float]] = json.loads(RECORD.read_text(encoding="utf-8"))
LAST = 10  # steps whose mean loss is compared where each batch draws its own kind of noise


@pytest.mark.parametrize("name", EXACT)
def test_seeded_training_repeats_the_recorded_losses(name: str, tmp_path: Path) -> None:
    """To 0.1 %: other sums of a product's parts, on another CPU, grow over 30 steps."""
    assert EXACT[name](tmp_path) == pytest.approx(LOSSES[name], rel=1e-3)


@pytest.mark.parametrize("name", MIXED)
def test_mixed_training_has_the_recorded_mean_loss(name: str, tmp_path: Path) -> None:
    """Within five of the standard deviations that four seeds have among each other."""
    means = [statistics.mean(LOSSES[f"{name}, seed {seed}"][-LAST:]) for seed in SEEDS]
    mean = statistics.mean(MIXED[name](tmp_path, SEEDS[0])[-LAST:])
    assert abs(mean - statistics.mean(means)) < 5 * statistics.stdev(means)
