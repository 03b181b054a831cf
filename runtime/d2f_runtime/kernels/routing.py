"""Which experts each row goes through, and which rows each expert has: all on the device.

Three kernels and no host: logits of the router in fp32, the choice of each row by itself, and for
each expert the list of its rows, which its own program gathers. So a step with experts is captured
like any other. An expert that all rows go through is one more, chosen by every row with weight 1.
Ties fall to the expert of the lowest number.

Shapes: M rows, D hidden size, E experts to choose from, C chosen of them, A experts that every row
goes through. A place is one row's choice: row (C + A) + its number.
"""

from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from d2f_runtime.kernels.language import (
    gdc_launch_dependents,
    gdc_wait,
    jit,
    overlaps,
    power_of_2,
    tl,
)

__all__ = ["SMALLEST", "Routes", "RoutingRule", "choose_reference", "route", "route_reference"]

SMALLEST = 1e-20  # of the sum that sigmoids' weights are divided by
FEW_ROWS, SPLITS = 256, 8  # up to so many, features are split, or logits would not fill the device
ROWS = 16  # of a tile of logits
EXPERTS = 32
FEATURES = 64
PLACES = 2048  # that an expert's program looks through at once


class RoutingRule(Protocol):
    """How rows choose; see `models.mixture_config`."""

    @property
    def num_chosen(self) -> int:
        """C."""
        ...

    @property
    def scoring(self) -> Literal["softmax", "sigmoid"]:
        """How logits become scores."""
        ...

    @property
    def num_groups(self) -> int:
        """Groups of experts, of which the best ones are kept; 1 keeps all."""
        ...

    @property
    def num_kept_groups(self) -> int:
        """Groups that are kept."""
        ...

    @property
    def normalised(self) -> bool:
        """Whether weights are divided by their sum."""
        ...

    @property
    def scale(self) -> float:
        """By which the weights are multiplied at the end."""
        ...


class Routes(NamedTuple):
    """Where rows go.

    Attributes:
        chosen: [M, C + A] int32 experts of each row, those that all go through last; -1 for rows
            that nobody sees.
        weights: [M, C + A] fp32 of each choice.
        places: [E + A, M] int32, the places of each expert in ascending order.
        counts: [E + A] int32, how many of them there are.
        num_always: A.
    """

    chosen: Tensor
    weights: Tensor
    places: Tensor
    counts: Tensor
    num_always: int


def choose_reference(
    logits: Tensor, bias: Tensor | None, rule: RoutingRule
) -> tuple[Tensor, Tensor]:
    """Return the experts of rows [M, C] int64, and their weights, of fp32 logits [M, E]."""
    scores = logits.sigmoid() if rule.scoring == "sigmoid" else logits.softmax(dim=-1)
    ranking = scores if bias is None else scores + bias.float()
    if rule.num_groups > 1:
        groups = ranking.view(len(ranking), rule.num_groups, -1)
        best = groups.topk(2, dim=-1).values.sum(dim=-1)
        kept = torch.zeros_like(best, dtype=torch.bool)
        kept.scatter_(-1, _first_best(best, rule.num_kept_groups), True)
        ranking = groups.masked_fill(~kept[..., None], -torch.inf).view_as(ranking)
    chosen = _first_best(ranking, rule.num_chosen)
    weights = scores.gather(-1, chosen)
    if rule.normalised:
        smallest = SMALLEST if rule.scoring == "sigmoid" else 0.0
        weights = weights / (weights.sum(dim=-1, keepdim=True) + smallest)
    return chosen, weights * rule.scale


def route_reference(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    rule: RoutingRule,
    num_always: int,
    visible: Tensor | None = None,
) -> Routes:
    """Send rows to their experts.

    Args:
        rows: [M, D].
        weight: [E, D] fp32 of the router.
        bias: [E] fp32 that decides the choice, but not the weights; None is none.
        rule: of the choice.
        num_always: A.
        visible: [M] int32, 0 for rows that go nowhere; None sends all.
    """
    num_rows, num_experts = len(rows), len(weight)
    chosen, weights = choose_reference(F.linear(rows.float(), weight.float()), bias, rule)
    always = torch.arange(num_experts, num_experts + num_always, device=rows.device)
    chosen = torch.cat([chosen, always.expand(num_rows, -1)], dim=1).int()
    weights = torch.cat([weights, weights.new_ones(num_rows, num_always)], dim=1)
    if visible is not None:
        chosen = chosen.masked_fill((visible == 0)[:, None], -1)
    flat = chosen.flatten()
    counts = torch.zeros(num_experts + num_always, dtype=torch.int32, device=rows.device)
    places = torch.zeros((len(counts), num_rows), dtype=torch.int32, device=rows.device)
    for expert in range(len(counts)):
        (mine,) = torch.where(flat == expert)
        counts[expert] = len(mine)
        places[expert, : len(mine)] = mine.int()
    return Routes(chosen, weights, places, counts, num_always)


def route(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    rule: RoutingRule,
    num_always: int,
    visible: Tensor | None = None,
) -> Routes:
    """Do what `route_reference` does; lists are filled as far as they count."""
    (num_rows, size), num_experts = rows.shape, len(weight)
    width = rule.num_chosen + num_always
    device, pdl = rows.device, overlaps(rows.device)
    splits = SPLITS if num_rows <= FEW_ROWS else 1
    logits = torch.empty((splits, num_rows, num_experts), device=device, dtype=torch.float32)
    chosen = torch.empty((num_rows, width), device=device, dtype=torch.int32)
    weights = torch.empty((num_rows, width), device=device, dtype=torch.float32)
    lists = torch.empty((num_experts + num_always, num_rows), device=device, dtype=torch.int32)
    counts = torch.empty(num_experts + num_always, device=device, dtype=torch.int32)
    share = -(-size // (FEATURES * splits)) * FEATURES
    grid = (-(-num_experts // EXPERTS), splits, -(-num_rows // ROWS))
    _logits[grid](
        rows, weight, logits, num_rows, num_experts, size, share,
        ROWS=ROWS, EXPERTS=EXPERTS, FEATURES=FEATURES, PDL=pdl,
        num_warps=4, num_stages=4, launch_pdl=pdl,
    )  # fmt: skip
    group = num_experts // rule.num_groups
    _choose[(num_rows,)](
        logits, bias, visible, chosen, weights, num_rows, num_experts, group, rule.scale,
        SPLITS=splits, C=rule.num_chosen, ALWAYS=num_always, WIDTH=power_of_2(width),
        GROUPS=rule.num_groups, ALL_GROUPS=power_of_2(rule.num_groups), GROUP=power_of_2(group),
        KEPT=rule.num_kept_groups, SIGMOID=rule.scoring == "sigmoid",
        NORMALISED=rule.normalised, PDL=pdl, num_warps=1, launch_pdl=pdl,
    )  # fmt: skip
    block = min(PLACES, power_of_2(num_rows * width))
    _list[(num_experts + num_always,)](
        chosen, lists, counts, num_rows, num_rows * width,
        BLOCK=block, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return Routes(chosen, weights, lists, counts, num_always)


def _first_best(values: Tensor, number: int) -> Tensor:
    """Return the places of the largest values along the last dimension; of equal ones the first."""
    return values.argsort(dim=-1, descending=True, stable=True)[..., :number]


@jit
def _logits(
    rows, weight, logits, num_rows, num_experts, size, share,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, FEATURES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    split = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((EXPERTS, ROWS), dtype=tl.float32)
    for first in range(split * share, tl.minimum((split + 1) * share, size), FEATURES):
        feature = first + tl.arange(0, FEATURES)
        held = tl.load(
            weight + expert[:, None] * size + feature[None, :],
            mask=(expert < num_experts)[:, None] & (feature < size)[None, :], other=0.0,
        )  # fmt: skip
        x = tl.load(
            rows + row[None, :] * size + feature[:, None],
            mask=(row < num_rows)[None, :] & (feature < size)[:, None], other=0.0,
        )  # fmt: skip
        total = tl.dot(held, x.to(tl.float32), total, input_precision="ieee")
    at = logits + (split * num_rows + row)[None, :] * num_experts + expert[:, None]
    tl.store(at, total, mask=(row < num_rows)[None, :] & (expert < num_experts)[:, None])


@jit
def _choose(
    logits, bias, visible, chosen, weights, num_rows, num_experts, group, scale,
    SPLITS: tl.constexpr, C: tl.constexpr, ALWAYS: tl.constexpr, WIDTH: tl.constexpr,
    GROUPS: tl.constexpr, ALL_GROUPS: tl.constexpr, GROUP: tl.constexpr, KEPT: tl.constexpr,
    SIGMOID: tl.constexpr, NORMALISED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    of_group = tl.arange(0, ALL_GROUPS)[:, None]
    in_group = tl.arange(0, GROUP)[None, :]
    expert = of_group * group + in_group
    inside = (of_group < GROUPS) & (in_group < group)
    logit = tl.zeros((ALL_GROUPS, GROUP), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        at = logits + (split * num_rows + row) * num_experts + expert
        logit += tl.load(at, mask=inside, other=0.0)
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-logit))
    else:
        largest = tl.max(tl.where(inside, logit, -float("inf")))
        power = tl.where(inside, tl.exp(logit - largest), 0.0)
        score = power / tl.sum(power)
    ranking = score
    if bias is not None:
        ranking += tl.load(bias + expert, mask=inside, other=0.0)
    # NaN is the last to be chosen, so that a broken row goes to experts that there are, once each
    ranking = tl.where(ranking == ranking, ranking, -1e30)
    ranking = tl.where(inside, ranking, -float("inf"))
    if GROUPS > 1:
        first = tl.max(ranking, axis=1)
        first_at = tl.argmax(ranking, axis=1)
        second = tl.max(tl.where(in_group == first_at[:, None], -float("inf"), ranking), axis=1)
        groups = tl.arange(0, ALL_GROUPS)
        best = first + second
        kept = groups < 0
        for _ in tl.static_range(KEPT):
            now = groups == tl.argmax(best, axis=0)
            kept |= now
            best = tl.where(now, -float("inf"), best)
        ranking = tl.where(kept[:, None], ranking, -float("inf"))
    number = tl.arange(0, WIDTH)
    found = num_experts + number - C
    weight = tl.where(number < C, 0.0, 1.0)
    for choice in tl.static_range(C):
        # the first of the best by its number: argmax of reshaped values gave a wrong place on GPUs
        best = tl.max(tl.max(ranking, axis=1), axis=0)
        of_best = tl.where(ranking == best, expert, num_experts)
        best_at = tl.min(tl.min(of_best, axis=1), axis=0)
        mine = expert == best_at
        found = tl.where(number == choice, best_at, found)
        its_score = tl.sum(tl.sum(tl.where(mine & inside, score, 0.0), axis=1), axis=0)
        weight = tl.where(number == choice, its_score, weight)
        ranking = tl.where(mine, -float("inf"), ranking)
    if NORMALISED:
        total = tl.sum(tl.where(number < C, weight, 0.0))
        if SIGMOID:
            total += 1e-20
        weight = tl.where(number < C, weight / total, weight)
    weight = tl.where(number < C, weight * scale, weight)
    if visible is not None:
        found = tl.where(tl.load(visible + row) == 0, -1, found)
    to = row * (C + ALWAYS) + number
    tl.store(chosen + to, found, mask=number < C + ALWAYS)
    tl.store(weights + to, weight, mask=number < C + ALWAYS)


@jit
def _list(chosen, lists, counts, num_rows, num_places, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    expert = tl.program_id(0)
    count = 0
    for first in range(0, num_places, BLOCK):
        place = first + tl.arange(0, BLOCK)
        mine = tl.load(chosen + place, mask=place < num_places, other=-1) == expert
        rank = count + tl.cumsum(mine.to(tl.int32), axis=0) - 1
        tl.store(lists + expert * num_rows + rank, place, mask=mine)
        count += tl.sum(mine.to(tl.int32))
    tl.store(counts + expert, count)
