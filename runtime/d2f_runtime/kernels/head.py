"""The best token of each row of logits, and how sure the model is: one pass over the vocabulary.

The vocabulary is split over several programs, each of whose lanes goes through ids of its own, so
that nothing is joined on the way; a second kernel joins the programs' findings. Neither writes
probabilities. Says what `sampling.propose` says of greedy rows. A maximum passes over NaN, so
logits that are no numbers are carried by the sums.

Shapes: N rows, V vocabulary, S splits.
"""

import torch
from torch import Tensor

from d2f_runtime.kernels.language import (
    gdc_launch_dependents,
    gdc_wait,
    jit,
    overlaps,
    power_of_2,
    tl,
)
from d2f_runtime.kernels.sampling import forbid, propose

__all__ = ["best_tokens", "best_tokens_reference"]

BLOCK = 1024
NUM_FINDINGS = 5  # of a split: highest, second highest, its id, sum of weights, of weights * logits
PROGRAMS = 1056  # enough to keep eight on each of an H100's 132 multiprocessors


def best_tokens_reference(
    logits: Tensor, *, mask_id: int, num_tokens: int, out: Tensor | None = None
) -> Tensor:
    """Return [4, N] fp32: best token, confidence, margin, negative entropy (see `Scores`).

    Args:
        logits: [N, V] of any float type.
        mask_id: never chosen.
        num_tokens: ids from here on are never chosen.
        out: [4, N] fp32, written and returned; it may lie in page-locked memory of the host.
    """
    allowed = forbid(logits, mask_id=mask_id, num_tokens=num_tokens)
    # fp32 holds ids below 2**24 exactly
    answers = torch.stack([values.float() for values in propose(allowed)])
    return answers if out is None else out.copy_(answers, non_blocking=True)


def best_tokens(
    logits: Tensor, *, mask_id: int, num_tokens: int, out: Tensor | None = None
) -> Tensor:
    """Do what `best_tokens_reference` does; of equal logits the lowest id wins."""
    num_rows, size = logits.shape
    splits = min(power_of_2(-(-PROGRAMS // num_rows)), 64, -(-size // BLOCK))
    device = logits.device
    shape = (num_rows, NUM_FINDINGS, splits)
    findings = torch.empty(shape, device=device, dtype=torch.float32)
    if out is None:
        out = torch.empty((4, num_rows), device=device, dtype=torch.float32)
    pdl = overlaps(device)
    share = -(-size // (splits * BLOCK)) * BLOCK
    _find[(num_rows, splits)](
        logits, findings, size, share, mask_id, num_tokens,
        BLOCK=BLOCK, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    _join[(num_rows,)](
        findings, out, num_rows, splits,
        BLOCK=power_of_2(splits), PDL=pdl, num_warps=1, launch_pdl=pdl,
    )  # fmt: skip
    return out


@jit
def _find(
    logits, findings, size, share, mask_id, num_tokens, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, split = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), -1e30, dtype=tl.float32)
    second = tl.full((BLOCK,), -1e30, dtype=tl.float32)
    token = tl.zeros((BLOCK,), dtype=tl.int32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    energy = tl.zeros((BLOCK,), dtype=tl.float32)  # sum of weight * (logit - highest)
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, num_tokens), BLOCK):
        ids = first + lane
        allowed = (ids < num_tokens) & (ids < begin + share) & (ids != mask_id)
        at = logits + row.to(tl.int64) * size + ids
        value = tl.load(at, mask=allowed, other=-1e30).to(tl.float32)
        new = tl.maximum(highest, value)
        second = tl.maximum(second, tl.minimum(highest, value))
        token = tl.where(value > highest, ids, token)
        # one of the two weights is 1
        below = tl.minimum(highest, value) - new
        fade = tl.exp(below)
        rises = value > highest
        energy = tl.where(
            rises, fade * (energy + below * total), energy + tl.where(allowed, fade * below, 0.0)
        )
        total = tl.where(rises, fade * total + 1.0, total + tl.where(allowed, fade, 0.0))
        total += value - value  # 0, or NaN for what is no finite number
        highest = new
    top = tl.max(highest, axis=0)
    best = tl.min(tl.where(highest == top, token, 2147483647), axis=0)
    is_best = (highest == top) & (token == best)
    runner_up = tl.max(tl.where(is_best, second, highest), axis=0)
    below = highest - top
    fade = tl.exp(below)
    energy = tl.sum(tl.where(total > 0, fade * (energy + below * total), 0.0), axis=0)
    total = tl.sum(fade * total, axis=0)
    at = findings + row * 5 * tl.num_programs(1) + split
    tl.store(at, top)
    tl.store(at + tl.num_programs(1), runner_up)
    tl.store(at + 2 * tl.num_programs(1), best.to(tl.float32))
    tl.store(at + 3 * tl.num_programs(1), total)
    tl.store(at + 4 * tl.num_programs(1), energy)


@jit
def _join(findings, answers, num_rows, num_splits, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    split = tl.arange(0, BLOCK)
    inside = split < num_splits
    at = findings + row * 5 * num_splits + split
    highest = tl.load(at, mask=inside, other=-1e30)
    second = tl.load(at + num_splits, mask=inside, other=-1e30)
    token = tl.load(at + 2 * num_splits, mask=inside, other=0.0)
    total = tl.load(at + 3 * num_splits, mask=inside, other=0.0)
    energy = tl.load(at + 4 * num_splits, mask=inside, other=0.0)
    top, index = tl.max(highest, axis=0, return_indices=True)
    others = tl.max(tl.where(split == index, -1e30, highest), axis=0)
    runner_up = tl.maximum(others, tl.max(tl.where(split == index, second, -1e30), axis=0))
    below = highest - top
    fade = tl.exp(below)  # 0 for a split without allowed ids
    energy = tl.sum(fade * energy + tl.where(total > 0, fade * below * total, 0.0), axis=0)
    total = tl.sum(fade * total, axis=0)
    confidence = 1.0 / total
    tl.store(answers + row, tl.sum(tl.where(split == index, token, 0.0), axis=0))
    tl.store(answers + num_rows + row, confidence)
    tl.store(answers + 2 * num_rows + row, (1.0 - tl.exp(runner_up - top)) * confidence)
    tl.store(answers + 3 * num_rows + row, energy * confidence - tl.log(total))
