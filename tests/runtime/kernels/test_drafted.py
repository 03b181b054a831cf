"""Products with a draft adapter's factors: as the reference has them, clean rows as the weight."""

import pytest
import torch
from torch import Tensor

from triton_mode import CAN_RUN, DEVICE  # isort: skip  # before the kernels

from d2f_runtime.kernels.drafted import (
    Cut,
    TiledFactors,
    cut_for,
    drafted_product,
    drafted_product_reference,
)
from d2f_runtime.kernels.language import HAS_TRITON
from kernel_checks import error

pytestmark = pytest.mark.torch
interpreted = pytest.mark.skipif(
    not HAS_TRITON or not CAN_RUN, reason="needs triton, on a GPU or interpreted"
)


def merged(num_features: int, blocks: list[tuple[int, int]], seed: int = 0) -> tuple[Tensor, ...]:
    """A weight and its factors; of each block outputs and ranks, which are its own."""
    generator = torch.Generator().manual_seed(seed)
    num_outputs, num_ranks = (sum(block[i] for block in blocks) for i in (0, 1))
    up = torch.zeros(num_outputs, num_ranks)
    output = rank = 0
    for outputs, ranks in blocks:
        up[output : output + outputs, rank : rank + ranks] = torch.randn(
            outputs, ranks, generator=generator
        )
        output, rank = output + outputs, rank + ranks
    weight = torch.randn(num_outputs, num_features, generator=generator)
    down = torch.randn(num_ranks, num_features, generator=generator) / num_features**0.5
    return weight.to(DEVICE), down.to(DEVICE), up.to(DEVICE)


CASES = {
    "one": [(64, 16)],
    "qkv": [(64, 24), (32, 24), (32, 24)],
    "uneven": [(64, 5), (64, 40)],
    "none": [(32, 0), (32, 8)],
}


@pytest.mark.parametrize("case", CASES)
def test_factors_are_cut_without_loss(case: str) -> None:
    weight, down, up = merged(128, CASES[case])
    factors = TiledFactors.of(down, up, 32)
    assert factors is not None
    x = torch.randn(5, 128, device=DEVICE)
    drafts = torch.tensor([0, 1, 1, 0, 1], dtype=torch.int32, device=DEVICE)
    wanted = x.double() @ weight.double().T
    wanted[drafts > 0] += (x.double() @ down.double().T @ up.double().T)[drafts > 0]
    for splits in (1, 2):
        parts = drafted_product_reference(x, weight, factors, drafts, cut=Cut(splits))
        assert parts.shape == (splits, 5, len(weight))
        assert error(parts.sum(dim=0), wanted.float()) < 1e-5


def test_what_does_not_fit_is_left_alone() -> None:
    _, down, up = merged(128, [(64, 129)])
    assert TiledFactors.of(down, up, 32) is None
    assert TiledFactors.of(down[:8], up[:40, :8], 32) is None
    assert TiledFactors.of(down[:8, :100], up[:, :8], 32) is None


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_rows", [1, 16, 37])
@pytest.mark.parametrize("splits", [1, 3])
def test_drafted_product(case: str, num_rows: int, splits: int) -> None:
    weight, down, up = merged(320, CASES[case], seed=num_rows)
    factors = TiledFactors.of(down, up, 32)
    assert factors is not None
    x = torch.randn(num_rows, 320, device=DEVICE)
    drafts = (torch.arange(num_rows, device=DEVICE) % 3 == 1).int()
    cut = Cut(splits, rows=32)
    found = drafted_product(x, weight, factors, drafts, cut=cut)
    wanted = drafted_product_reference(x, weight, factors, drafts, cut=cut)
    assert found.shape == wanted.shape
    assert error(found, wanted) < 1e-5
    alone = drafted_product(x, weight, factors, torch.zeros_like(drafts), cut=cut)
    assert torch.equal(found[:, drafts == 0], alone[:, drafts == 0])


@pytest.mark.parametrize("num_features", [64, 576, 896, 1536, 4864])
def test_rows_do_not_decide_how_a_sum_is_cut(num_features: int) -> None:
    cuts = [cut_for(rows, num_features, 64, may_split=True) for rows in (1, 16, 100, 129, 256)]
    splits = {cut.splits for cut in cuts if cut is not None}
    assert len(splits) == 1
    assert max(splits) <= max(1, num_features // 128)
    assert cut_for(257, num_features, 64, may_split=True) is None
