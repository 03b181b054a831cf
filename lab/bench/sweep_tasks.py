"""What a sweep answers: problems in a file, or a task of lm-evaluation-harness."""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from d2f_runtime.evaluation.samples import Question, Sample, answer_all
from d2f_stream.core.errors import InvalidParams
from d2f_stream.core.params import ParamOverrides
from d2f_stream.core.session import Engine
from lab.bench.stream import read_prompts

__all__ = ["HarnessTask", "ProblemTask", "SweepTask"]

Note = Callable[[int, int], object]
"""Is told how many answers are there, and how many there will be."""


class SweepTask(Protocol):
    """Scores one setting."""

    @property
    def columns(self) -> dict[str, Any]:
        """What the task says of itself in a row: task, num_problems, and what it overrides."""
        ...

    async def measure(
        self, engine: Engine, overrides: ParamOverrides, note: Note
    ) -> dict[str, Any]:
        """Answer everything and return score and speed."""
        ...


@dataclass(frozen=True, slots=True)
class ProblemTask:
    """JSON lines with `prompt` and `ending`: an answer that ends so is right.

    Attributes:
        name: of the task.
        problems: all that are answered.
        concurrency: answers at a time.
        timed: measure tokens/s too, one answer at a time; only for a machine at rest.
    """

    name: str
    problems: Sequence[dict[str, str]]
    concurrency: int = 8
    timed: bool = False

    @classmethod
    def read(cls, path: Path, number: int, **options: Any) -> "ProblemTask":
        """Read the first `number` problems of a file."""
        return cls(path.stem, read_prompts(path, number), **options)

    @property
    def columns(self) -> dict[str, Any]:
        """Return name and number."""
        return {"task": self.name, "num_problems": len(self.problems)}

    async def measure(
        self, engine: Engine, overrides: ParamOverrides, note: Note
    ) -> dict[str, Any]:
        """Answer all problems. Safe to cancel.

        Raises:
            InvalidParams: the model refuses a problem under this setting.
        """
        params = engine.defaults.with_overrides(overrides)
        questions = [Question(problem["prompt"], params) for problem in self.problems]
        if self.timed:
            await answer_all(engine, questions[:1], concurrency=1)  # warm up
        done = itertools.count(1)
        began = time.perf_counter()
        samples = await answer_all(
            engine,
            questions,
            concurrency=1 if self.timed else self.concurrency,
            on_sample=lambda *_: note(next(done), len(questions)),
        )
        seconds = time.perf_counter() - began
        return self._figures(samples, seconds if self.timed else None)

    def _figures(self, samples: Sequence[Sample], seconds: float | None) -> dict[str, Any]:
        refused = [sample.error for sample in samples if sample.error]
        if refused:
            raise InvalidParams("setting", refused[0], "one that the model takes everywhere")
        right = [s.text.endswith(p["ending"]) for p, s in zip(self.problems, samples, strict=True)]
        tokens, steps = sum(s.total_tokens for s in samples), sum(s.steps for s in samples)
        return {
            "score": round(sum(right) / len(right), 4),
            "tokens_per_step": round(tokens / steps, 3),
            "mean_tokens": round(tokens / len(samples), 1),
            "mean_steps": round(steps / len(samples), 2),
            "tokens_per_s": "" if seconds is None else round(tokens / seconds, 1),
        }


@dataclass(frozen=True, slots=True)
class HarnessTask:
    """A task that lm-eval knows; its own generation settings hold where a sweep sets nothing.

    Attributes:
        name: of the task.
        number: of its documents.
        include_path: a folder with tasks beside lm-eval's own.
        arguments: of D2FStreamLM: model, batch size, device and so on.
    """

    name: str
    number: int
    include_path: Path | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def columns(self) -> dict[str, Any]:
        """Return name and number, and whose the length of the answers is."""
        return {"task": self.name, "num_problems": self.number, "max_new_tokens": "task"}

    async def measure(
        self, engine: Engine, overrides: ParamOverrides, note: Note
    ) -> dict[str, Any]:
        """Run lm-eval on a thread, over the weights that `engine` keeps loaded.

        Not safe to cancel: the run goes on to its end.

        Raises:
            MissingExtra: lm-eval is not installed.
            InvalidParams: the task has no metric that is a number, or a document was refused.
        """
        from lab.bench.harness import score_task

        figures = await asyncio.to_thread(
            score_task,
            self.name,
            overrides,
            number=self.number,
            include_path=self.include_path,
            **self.arguments,
        )
        note(self.number, self.number)
        return figures
