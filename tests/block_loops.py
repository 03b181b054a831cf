"""Published loops of block diffusion, naively: the oracles of schedules and of editing.

Each is written from a description of the publisher's code and shares nothing with d2f_runtime; all
of them run one forward over the whole canvas for a step and cache nothing. A forward answers each
row by what it may see: the canvas up to the end of its block.

    block_loop: `generate` of SDAR (JetAstra/SDAR, c2041a8), LLaDA2.0 (ZHZisZZ/dllm, ca17675) and
        Stable-DiffCoder (generate_block): they differ in the rule of a step, which is handed in
    joint_threshold: LLaDA2.1 (ZHZisZZ/dllm, ca17675, pipelines/llada21)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

# (canvas up to the block's end, position) -> (token, confidence)
Propose = Callable[[tuple[int, ...], int], tuple[int, float]]
# (masked rows with their confidence, step of the block) -> rows to accept
Rule = Callable[[list[tuple[int, float]], int], list[int]]


@dataclass
class Loop:
    """The settings and the outcome of a run.

    Attributes:
        num_forwards: those that only cache left out.
        canvas: prompt and answer, as far as they were made.
    """

    propose: Propose
    mask: int
    ends: Sequence[int]
    block_size: int
    num_forwards: int = 0
    canvas: list[int] = field(default_factory=list)

    def answer(self, num_prompt: int, max_new_tokens: int) -> list[int]:
        """Up to the first EOS, included."""
        found = []
        for token in self.canvas[num_prompt : num_prompt + max_new_tokens]:
            found.append(token)
            if token in self.ends:
                break
        return found

    def forward(self, stop: int, rows: Sequence[int]) -> dict[int, tuple[int, float]]:
        self.num_forwards += 1
        seen = tuple(self.canvas[:stop])
        return {row: self.propose(seen, row) for row in rows}


def block_loop(
    loop: Loop, prompt: Sequence[int], max_new_tokens: int, rule: Rule, *, whole: bool = True
) -> None:
    size, end = loop.block_size, len(prompt) + max_new_tokens
    if whole:
        end += -end % size
    loop.canvas = [*prompt, *[loop.mask] * (end - len(prompt))]
    for start in range(len(prompt) // size * size, end, size):
        stop = min(start + size, end)
        step = 0
        while masked := [p for p in range(start, stop) if loop.canvas[p] == loop.mask]:
            found = loop.forward(stop, masked)
            for row in rule([(row, found[row][1]) for row in masked], step):
                loop.canvas[row] = found[row][0]
            step += 1
        if set(loop.canvas[len(prompt) : stop]) & set(loop.ends):
            return


def even(size: int, num_steps: int) -> list[int]:
    """How many tokens each step brings: the remainder goes to the first."""
    return [size // num_steps + (i < size % num_steps) for i in range(num_steps)]


def linear(num_masks: int, num_steps: int) -> list[int]:
    """The linear schedule in single precision, without steps that would bring none."""
    found, single, times = [], np.float32, np.arange(num_steps + 1) / num_steps
    masked = [single(1) - (single(1) - single(time)) for time in times]
    for t in range(num_steps, 0, -1):
        share = min(round(num_masks * (1 - float(masked[t - 1] / masked[t]))), num_masks)
        num_masks -= share
        found.append(share)
    return [share for share in found if share]


def best(rows: list[tuple[int, float]], number: int) -> list[int]:
    """The leftmost of equals first."""
    return [row for row, _ in sorted(rows, key=lambda row: -row[1])[:number]]


def static(schedule: Sequence[int]) -> Rule:
    return lambda rows, step: best(rows, schedule[step])


def static_by_masks(schedule: Callable[[int], list[int]]) -> Rule:
    """The schedule of a block follows from its masks."""
    shares: list[int] = []

    def rule(rows: list[tuple[int, float]], step: int) -> list[int]:
        shares[:] = schedule(len(rows)) if step == 0 else shares
        return best(rows, shares[step])

    return rule


def sequential(schedule: Sequence[int]) -> Rule:
    return lambda rows, step: [row for row, _ in rows[: schedule[step]]]


def dynamic(schedule: Sequence[int], threshold: float) -> Rule:
    def rule(rows: list[tuple[int, float]], step: int) -> list[int]:
        sure = [row for row, confidence in rows if confidence > threshold]
        least = min(schedule[step], len(rows))
        return sure if len(sure) >= least else best(rows, least)

    return rule


def best_and_sure(threshold: float) -> Rule:
    """The best row always, and every other of at least the threshold."""

    def rule(rows: list[tuple[int, float]], step: int) -> list[int]:
        del step
        return [row for row, c in rows if c >= threshold or row in best(rows, 1)]

    return rule


def joint_threshold(
    loop: Loop,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    threshold: float,
    editing_threshold: float,
    max_post_steps: int,
    stops_early: bool,
    num_to_transfer: int = 1,
) -> None:
    size, end = loop.block_size, len(prompt) + max_new_tokens
    end += -end % size
    loop.canvas = [*prompt, *[loop.mask] * (end - len(prompt))]
    for start in range(len(prompt) // size * size, end, size):
        stop, post = start + size, 0
        while True:
            masked = [p for p in range(start, stop) if loop.canvas[p] == loop.mask]
            if not masked:
                post += 1
                if post > max_post_steps:
                    break
            editable = [p for p in range(max(start, len(prompt)), stop) if p not in masked]
            found = loop.forward(stop, range(start, stop))
            taken = [p for p in masked if found[p][1] > threshold]
            if masked and len(taken) < num_to_transfer:
                taken = best([(p, found[p][1]) for p in masked], num_to_transfer)
            edits = [
                p
                for p in editable
                if found[p][1] > editing_threshold and found[p][0] != loop.canvas[p]
            ]
            for p in (*taken, *edits):
                loop.canvas[p] = found[p][0]
            if not masked and not edits:
                break
        answer = loop.canvas[len(prompt) : stop]
        if stops_early and loop.mask not in answer and set(answer) & set(loop.ends):
            return
