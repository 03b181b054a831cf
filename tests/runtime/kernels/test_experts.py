"""Mixtures of experts: where rows go, and what the chosen experts make of them."""

import pytest
import torch
from torch import Tensor

from triton_mode import CAN_RUN, DEVICE  # isort: skip  # before the kernels

from d2f_runtime.kernels import routing
from d2f_runtime.kernels.activation import quantise_rows
from d2f_runtime.kernels.expert_weights import ExpertWeights, pack_fp8, pack_nf4
from d2f_runtime.kernels.experts import (
    expert_tiling,
    through_experts,
    through_experts_reference,
)
from d2f_runtime.kernels.language import HAS_TRITON
from d2f_runtime.kernels.routing import Routes, route, route_reference
from d2f_runtime.models.mixture_config import MixtureConfig
from d2f_runtime.quantization.nf4 import quantise_nf4
from kernel_checks import error, random

pytestmark = [pytest.mark.torch]

NEEDS_TRITON = pytest.mark.skipif(
    not HAS_TRITON or not CAN_RUN, reason="needs triton, on a GPU or interpreted"
)
# fp32 sums in another order; on a GPU of rows in bf16, rounded after the gate and at the end
CLOSE = 1e-5 if DEVICE == "cpu" else 1e-2
DTYPE = torch.float32 if DEVICE == "cpu" else torch.bfloat16


def rule(experts: int, chosen: int, groups: int = 1, kept: int = 1) -> MixtureConfig:
    return MixtureConfig(
        num_experts=experts, num_chosen=chosen, ffn_size=64,
        scoring="sigmoid" if groups > 1 else "softmax",
        num_groups=groups, num_kept_groups=kept, scale=2.5,
    )  # fmt: skip


def packed(weights: Tensor, quantization: str) -> ExpertWeights:
    """Pack [E, N, K] fp32."""

    def one(weight: Tensor) -> tuple[Tensor, Tensor | None]:
        if quantization == "nf4":
            stored = quantise_nf4(weight)
            return pack_nf4(stored.codes_by_row(), stored.scales_by_row())
        rows = quantise_rows(weight)
        assert rows.scale is not None
        return pack_fp8(rows.values, rows.scale)

    if quantization == "none":
        return ExpertWeights(weights.to(DTYPE))
    return ExpertWeights.stacked((one(weight) for weight in weights), len(weights))


def experts(
    number: int, size: int, inner: int, quantization: str
) -> tuple[ExpertWeights, ExpertWeights]:
    """Return gates with ups, and downs, of which none makes large numbers."""
    gate_up, down = random(number, 2 * inner, size), random(number, size, inner)
    return packed(gate_up / size**0.5, quantization), packed(down / inner**0.5, quantization)


def routes_of(chosen: list[list[int]], num_experts: int, num_always: int = 0) -> Routes:
    """Return routes by the experts of each row, with weights of some size; -1 goes nowhere."""
    table = torch.tensor(chosen, dtype=torch.int32, device=DEVICE)
    flat = table.flatten()
    lists = torch.zeros((num_experts, len(chosen)), dtype=torch.int32, device=DEVICE)
    counts = torch.zeros(num_experts, dtype=torch.int32, device=DEVICE)
    for expert in range(num_experts):
        (mine,) = torch.where(flat == expert)
        lists[expert, : len(mine)], counts[expert] = mine.int(), len(mine)
    return Routes(table, torch.rand(table.shape, device=DEVICE) + 0.5, lists, counts, num_always)


def oracle(x: Tensor, routes: Routes, gate_up: ExpertWeights, down: ExpertWeights) -> Tensor:
    """Go through rows and their choices one by one, in fp64."""
    out = torch.zeros((*routes.chosen.shape, x.shape[1]), dtype=torch.float64, device=x.device)
    for row, chosen in enumerate(routes.chosen.tolist()):
        for choice, expert in enumerate(chosen):
            if expert >= 0:
                weight = gate_up.of(expert).double()
                gate, up = (weight[:, : x.shape[1]] @ x[row].double()).chunk(2)
                wide = gate * gate.sigmoid() * up
                made = down.of(expert).double()[: x.shape[1], : len(wide)] @ wide
                out[row, choice] = made * routes.weights[row, choice].double()
    return out.transpose(0, 1)


# The interpreter takes 40 ms for a row's choice, so it splits and looks through fewer at once.
FEW_ROWS, PLACES = (routing.FEW_ROWS, routing.PLACES) if DEVICE == "cuda" else (35, 64)
MANY_ROWS = 256 if DEVICE == "cuda" else 33
ROUTERS = [  # rows, experts, chosen, groups, kept, always, with a bias and rows that go nowhere
    (1, 256, 8, 8, 4, 1, False),
    (2, 64, 8, 8, 4, 1, True),
    (17, 128, 4, 1, 1, 0, False),
    (33, 64, 1, 1, 1, 0, True),
    (20, 6, 3, 3, 2, 2, True),  # sizes that no power of two is
    (FEW_ROWS, 8, 4, 4, 2, 1, True),
    (FEW_ROWS + 5, 4, 2, 1, 1, 1, False),
]


@NEEDS_TRITON
@pytest.mark.parametrize(
    ("rows", "number", "chosen", "groups", "kept", "always", "extras"), ROUTERS
)
@pytest.mark.usefixtures("poisoned")
def test_rows_find_their_experts(
    rows: int, number: int, chosen: int, groups: int, kept: int, always: int, extras: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(routing, "FEW_ROWS", FEW_ROWS)
    monkeypatch.setattr(routing, "PLACES", PLACES)
    x, weight = random(rows, 96), random(number, 96) * 0.1
    bias = random(number) * 0.1 if extras else None
    visible = (torch.arange(rows, device=DEVICE) % 5 != 2).int() if extras else None
    given = {"rule": rule(number, chosen, groups, kept), "num_always": always, "visible": visible}
    found = route(x, weight, bias, **given)  # type: ignore[arg-type]
    wanted = route_reference(x, weight, bias, **given)  # type: ignore[arg-type]
    # sums in another order may change which of two nearly equal experts is chosen
    same = (found.chosen == wanted.chosen).all(dim=1)
    assert same.float().mean() > 0.97
    assert torch.allclose(found.weights[same], wanted.weights[same], rtol=1e-4)
    places = [found.places[e, :c].tolist() for e, c in enumerate(found.counts.tolist())]
    flat = found.chosen.flatten()
    assert places == [torch.where(flat == e)[0].tolist() for e in range(number + always)]


@NEEDS_TRITON
def test_ties_fall_to_the_first_experts() -> None:
    x, weight = random(3, 64), torch.zeros(64, 64, device=DEVICE)
    for groups, kept in ((1, 1), (8, 4)):
        found = route(x, weight, None, rule=rule(64, 4, groups, kept), num_always=0)
        assert found.chosen.tolist() == [[0, 1, 2, 3]] * 3
        assert found.weights.flatten().tolist() == pytest.approx([2.5 / 4] * 12)


@NEEDS_TRITON
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, interpreted
@pytest.mark.parametrize("groups", [1, 8])
def test_a_broken_row_breaks_no_other(groups: int) -> None:
    x, weight = random(3, 64), random(64, 64)
    wanted = route(x, weight, None, rule=rule(64, 4, groups, groups), num_always=1)
    x[1] = float("nan")
    found = route(x, weight, None, rule=rule(64, 4, groups, groups), num_always=1)
    assert len(set(found.chosen[1].tolist())) == 5
    assert all(0 <= expert < 65 for expert in found.chosen[1].tolist())
    for row in (0, 2):
        assert torch.equal(found.chosen[row], wanted.chosen[row])


CROWDS = {
    "one row": ([[3, 0, 2]], 5),
    "ties of all": ([[0, 1, 2]] * 9, 4),
    "all rows on one": ([[2]] * 40, 3),
    "experts without rows": ([[0, 15], [15, 5], [5, 0]], 16),
    "some go nowhere": ([[1, 2], [-1, -1], [2, 0], [-1, -1]], 3),
    "one tile and a row": ([[1, 0]] * 17, 2),
    "more than one program's": ([[0, 2]] * 130 + [[1, 2]] * 150, 3),
}


@NEEDS_TRITON
@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        *((name, "none") for name in CROWDS),
        *((name, q) for name in ("one row", "some go nowhere") for q in ("fp8", "nf4")),
        ("one tile and a row", "nf4"),
    ],
)
@pytest.mark.usefixtures("poisoned")
def test_experts_make_what_they_should(name: str, quantization: str) -> None:
    chosen, number = CROWDS[name]
    size, inner = (192, 192) if name == "one row" else (128, 64)
    num_always = int(name in ("more than one program's", "one tile and a row"))
    routes = routes_of(chosen, number, num_always)
    gate_up, down = experts(number, size, inner, quantization)
    x = random(len(chosen), size).to(DTYPE)
    found = through_experts(x, routes, gate_up, down)
    wanted = oracle(x, routes, gate_up, down)
    assert error(through_experts_reference(x.double(), routes, gate_up, down), wanted) < 1e-9
    go = (routes.chosen >= 0).any(dim=1)
    assert error(found[:, go], wanted[:, go]) < CLOSE


@NEEDS_TRITON
@pytest.mark.parametrize(
    ("rows", "quantization"),
    [(1, "none"), (16, "none"), (MANY_ROWS, "none"), (17, "fp8"), (17, "nf4")],
)
def test_any_number_of_rows(rows: int, quantization: str) -> None:
    number, size, inner = 4, 128, 64
    gate_up, down = experts(number + 1, size, inner, quantization)
    x = random(rows, size).to(DTYPE)
    routes = route(x, random(number, size), None, rule=rule(number, 2, 2, 1), num_always=1)
    found = through_experts(x, routes, gate_up, down)
    wanted = through_experts_reference(x.double(), routes, gate_up, down)
    assert error(found, wanted) < CLOSE


@NEEDS_TRITON
@pytest.mark.usefixtures("poisoned")
def test_sizes_that_no_tile_divides() -> None:
    gate_up, down = experts(6, 88, 24, "none")
    x = random(5, 88).to(DTYPE)
    routes = routes_of([[0, 5], [1, 5], [2, 5], [3, 5], [4, 5]], 6)
    found = through_experts(x, routes, gate_up, down)
    assert error(found, oracle(x, routes, gate_up, down)) < CLOSE


@pytest.mark.parametrize("quantization", ["fp8", "nf4"])
@pytest.mark.parametrize(("outputs", "features"), [(64, 128), (192, 320), (40, 64)])
def test_packed_experts_are_the_quantised_ones(
    quantization: str, outputs: int, features: int
) -> None:
    weight = random(2, outputs, features)
    held = packed(weight, quantization)
    assert held.bits == {"fp8": 8, "nf4": 4}[quantization]
    found = held.of(1)
    assert found.shape == held.shape[1:]
    if quantization == "nf4":
        wanted = quantise_nf4(weight[1]).dequantised(torch.float32)
        bound = 2**-7  # values and scales in bf16
    else:
        wanted, bound = quantise_rows(weight[1]).dequantised(), 1e-6
    assert torch.allclose(found[:outputs, :features], wanted, rtol=bound)
    assert not found[outputs:].any()
    assert not found[:, features:].any()


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("gated", [False, True])
def test_tiles_hold_whole_codes(bits: int, gated: bool) -> None:
    for rows in range(1, 1000):
        tiling = expert_tiling(rows, bits=bits, gated=gated)
        assert tiling.rows >= 16  # what a matrix instruction takes
        assert bits >= 16 or tiling.features == {4: 128, 8: 64}[bits]
        assert tiling.outputs % 64 == 0
