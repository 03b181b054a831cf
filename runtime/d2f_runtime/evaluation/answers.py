"""Answers to many prompts, decoded side by side over one backend.

A GPU answers a thousand prompts in seconds so; the proposals, and so the answers, are those of one
stream at a time.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from d2f_runtime.backends.base import Backend, StepRow
from d2f_runtime.decoding.policy import AcceptancePolicy
from d2f_runtime.engine.denoiser import Decoder, decoder_of
from d2f_stream.core.params import GenerationParams

__all__ = ["Answer", "decode_all"]


@dataclass(frozen=True, slots=True)
class Answer:
    """One decoded answer."""

    tokens: tuple[int, ...]
    num_useful: int
    num_steps: int


def decode_all(
    backend: Backend,
    prompts: Iterable[Sequence[int]],
    params: GenerationParams,
    *,
    rows: int = 256,
    policy: AcceptancePolicy | None = None,
    on_answer: Callable[[], object] | None = None,
    on_step: Callable[[int, Decoder], object] | None = None,
) -> list[Answer]:
    """Decode every prompt greedily, at most `rows` at a time; answers in order of the prompts.

    `policy` replaces that of the parameters; `on_answer` is called after each, for progress bars;
    `on_step` after each step of each answer, with the prompt's number. A prompt is asked for when
    there is room for it.
    """
    waiting = enumerate(prompts)
    running: dict[int, tuple[Any, Decoder]] = {}
    answers: dict[int, Answer] = {}
    while True:
        for number, prompt in islice(waiting, rows - len(running)):
            decoder = decoder_of(backend.info, prompt, params, policy)
            capacity = len(prompt) + params.max_new_tokens + params.block_size
            slot = backend.open_slot(min(capacity, backend.info.max_len))
            running[number] = (slot, decoder)
        if not running:
            return [answers[number] for number in sorted(answers)]
        step_rows: list[StepRow] = []
        for number, (slot, decoder) in list(running.items()):
            window = decoder.next_window()
            if window is not None:
                step_rows.append(StepRow(slot, window))
                continue
            del running[number]
            backend.close_slot(slot)
            answers[number] = _answer(decoder)
            if on_answer is not None:
                on_answer()
        found = backend.step(step_rows) if step_rows else []
        for (number, (_, decoder)), proposals in zip(running.items(), found, strict=True):
            decoder.apply(proposals)
            if on_step is not None:
                on_step(number, decoder)


def _answer(decoder: Decoder) -> Answer:
    useful = decoder.num_useful_tokens
    return Answer(tuple(decoder.answer_tokens[:useful]), useful, decoder.num_steps)
