"""How good and how parallel: exact answers and useful tokens per step on held-out problems."""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from d2f_runtime.backends.base import Backend
from d2f_runtime.evaluation.answers import Answer, decode_all
from d2f_runtime.text.tokenizer import TextCodec
from d2f_stream.core.params import GenerationParams
from lab.embedded_model.problems import Problem, is_correct, problems

__all__ = ["Report", "evaluate", "held_out", "report"]

HELD_OUT_SEED = 20_000


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of one model under one setting.

    Attributes:
        model: which one.
        setting: how it decoded.
        num_problems: how many were decoded.
        accuracy: share with exactly the right final number.
        tokens_per_step: useful tokens over steps, summed over all problems.
        mean_tokens: useful tokens of an answer.
        by_operations: accuracy for each number of operations.
        with_distractor: accuracy where the problem holds a number that does not matter.
    """

    model: str
    setting: dict[str, Any]
    num_problems: int
    accuracy: float
    tokens_per_step: float
    mean_tokens: float
    by_operations: dict[int, float]
    with_distractor: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, rounded for a record."""
        values = asdict(self)
        for name in ("accuracy", "tokens_per_step", "mean_tokens", "with_distractor"):
            values[name] = round(values[name], 4)
        values["by_operations"] = {k: round(v, 4) for k, v in self.by_operations.items()}
        return values

    def line(self) -> str:
        """Return one line for a terminal."""
        detail = " ".join(f"{k}:{v:.3f}" for k, v in self.by_operations.items())
        return (
            f"{self.model} {json.dumps(self.setting)}: right {self.accuracy:.4f}"
            f"  tokens/step {self.tokens_per_step:.2f}  tokens {self.mean_tokens:.0f}"
            f"  by operations {detail}"
        )


def held_out(number: int) -> list[Problem]:
    """Return the first `number` problems of the evaluation stream."""
    return list(itertools.islice(problems(HELD_OUT_SEED, split="held_out"), number))


def evaluate(
    model: str,
    backend: Backend,
    codec: TextCodec,
    sample: Sequence[Problem],
    params: GenerationParams,
    *,
    rows: int = 256,
    on_answer: Callable[[], object] | None = None,
) -> Report:
    """Decode the sample and compare with the generator's answers."""
    prompts = [codec.encode(problem.question) for problem in sample]
    answers = decode_all(backend, prompts, params, rows=rows, on_answer=on_answer)
    defaults = GenerationParams()
    setting = {
        name: value
        for name, value in msgspec.structs.asdict(params).items()
        if value != getattr(defaults, name) or name.endswith("threshold")
    }
    return report(model, setting, sample, answers, codec)


def report(
    model: str,
    setting: dict[str, Any],
    sample: Sequence[Problem],
    answers: Sequence[Answer],
    codec: TextCodec,
) -> Report:
    """Count what is right."""
    right = [is_correct(p, codec.decode(a.tokens)) for p, a in zip(sample, answers, strict=True)]

    def share(chosen: list[bool]) -> float:
        return sum(chosen) / max(1, len(chosen))

    by_operations = {
        n: share([ok for p, ok in zip(sample, right, strict=True) if p.num_operations == n])
        for n in sorted({problem.num_operations for problem in sample})
    }
    distracted = [ok for p, ok in zip(sample, right, strict=True) if p.has_distractor]
    useful = sum(answer.num_useful for answer in answers)
    return Report(
        model=model,
        setting=setting,
        num_problems=len(sample),
        accuracy=share(right),
        tokens_per_step=useful / max(1, sum(answer.num_steps for answer in answers)),
        mean_tokens=useful / max(1, len(answers)),
        by_operations=by_operations,
        with_distractor=share(distracted),
    )
