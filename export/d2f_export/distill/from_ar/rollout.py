"""Rollout: answers decoded again with a draft, and where its windows began.

A draft that learns from random windows sees easy and hard places alike; decoding begins a window
where the one before it failed. So training can go on from the windows that decoding really meets
(the on-policy phase).
"""

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from d2f_export.distill.from_ar.answers import Answers
from d2f_runtime.backends.base import Backend
from d2f_runtime.engine.denoiser import Decoder
from d2f_runtime.evaluation.answers import decode_all
from d2f_stream.core.presets import PRESETS

__all__ = ["roll_out"]


def roll_out(
    backend: Backend,
    written: Answers,
    *,
    block_size: int,
    answer_length: int,
    rows: int,
    limit: int,
    seconds: float = float("inf"),
) -> Answers:
    """Answer prompts by verified blocks; unfinished answers are dropped. Blocks.

    Args:
        backend: of the base with the draft adapter.
        written: whose prompts are answered, in their order.
        block_size: masks that draft at a time.
        answer_length: tokens.
        rows: answers decoded side by side.
        limit: prompts at most.
        seconds: after which no further answer begins.

    Returns:
        The answers with `begins`. A window begins at the token that the model says at the end of a
        step, since its place is a mask while the drafts behind it are made.
    """
    params = PRESETS["verified"].with_overrides(
        {"block_size": block_size, "max_new_tokens": answer_length}
    )
    prompts: list[list[int]] = []
    begins: list[list[int]] = []
    until = time.monotonic() + seconds

    def asked() -> Iterator[list[int]]:
        ends = written.starts + written.prompts
        for start, end in zip(written.starts[:limit], ends[:limit], strict=True):
            if time.monotonic() > until:
                return
            prompts.append(written.tokens[start:end].tolist())
            begins.append([])
            yield prompts[-1]

    def note(number: int, decoder: Decoder) -> None:
        if not decoder.finished:
            begins[number].append(len(decoder.cached_tokens) - len(prompts[number]))

    found = decode_all(backend, asked(), params, rows=rows, on_step=note)
    ends = set(backend.info.eos_ids)
    kept = [number for number, answer in enumerate(found) if answer.tokens[-1] in ends]
    answers = Answers.of((prompts[number], list(found[number].tokens)) for number in kept)
    marks = np.zeros(len(answers.tokens), np.bool_)
    for first, number in zip(answers.starts + answers.prompts, kept, strict=True):
        marks[first + np.asarray(begins[number], np.int64)] = True
    return replace(answers, begins=marks)
