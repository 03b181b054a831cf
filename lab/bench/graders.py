"""Graders: whether an answer to a problem of HumanEval or GSM8K is right.

A program of HumanEval runs in a process of its own, without site packages, with bounds of time and
memory. That keeps accidents away, not malice: run it where nothing is to be lost.
"""

import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from d2f_runtime.evaluation.humaneval import program_of

__all__ = ["CodeProblem", "WordProblem", "grade"]

SECONDS: Final = 10
MEMORY: Final = 2**32  # bytes of a program
WORKERS: Final = 8

CODE_REQUEST: Final = (
    "Please provide a self-contained Python script that solves the following problem in a "
    "markdown code block:\n```\n{}\n```\n"
)
WORD_REQUEST: Final = (
    "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
)
NUMBER: Final = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class CodeProblem:
    """A problem of HumanEval: a function's head, its name, and a test that calls `check`."""

    prompt: str
    entry_point: str
    test: str

    @property
    def request(self) -> str:
        """What the user says, as EvalPlus puts it."""
        return CODE_REQUEST.format(self.prompt.strip())

    def is_right(self, answer: str) -> bool:
        """Run the answer's program against the test. Blocks for ten seconds at most."""
        program = program_of(self.prompt, _named_fence(answer), self.entry_point)
        if not program:
            return False
        source = f"{program}\n\n{self.test}\n\ncheck({self.entry_point})\n"
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-"],
                input=source.encode(),
                capture_output=True,
                timeout=SECONDS,
                preexec_fn=_bound,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0


@dataclass(frozen=True, slots=True)
class WordProblem:
    """A problem of GSM8K and its number."""

    question: str
    number: float

    @classmethod
    def of(cls, question: str, solution: str) -> "WordProblem":
        """Take the number behind `####` of the published solution."""
        return cls(question, _number(solution.rpartition("####")[2]) or 0.0)

    @property
    def request(self) -> str:
        """What the user says, as Qwen's model cards put it."""
        return WORD_REQUEST.format(self.question)

    def is_right(self, answer: str) -> bool:
        """Compare the last number in a box; without a box, the last number."""
        boxed = answer.rpartition("\\boxed{")[2].partition("}")[0] if "\\boxed{" in answer else ""
        found = _number(boxed or answer)
        return found is not None and abs(found - self.number) < 1e-6


def grade(problems: Sequence[CodeProblem | WordProblem], answers: Sequence[str]) -> list[bool]:
    """Return which answers are right, several at a time."""
    with ThreadPoolExecutor(WORKERS) as pool:
        pairs = zip(problems, answers, strict=True)
        return list(pool.map(lambda pair: pair[0].is_right(pair[1]), pairs))


def _named_fence(answer: str) -> str:
    """Name the language of a first fence that leaves it out, or tells it in a line of its own."""
    head, fence, rest = answer.partition("```")
    if not fence:
        return answer
    body = rest.removeprefix("python").removeprefix("py").lstrip(" ")
    body = body.removeprefix("\n").removeprefix("python\n")
    return f"{head}```python\n{body}"


def _number(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _bound() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
