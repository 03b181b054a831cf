"""The model package: what it holds, and its answers to what people ask first.

Each answer must be there, end, not turn in circles, and be what the model says token by token.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from d2f_runtime.engine.local import LocalEngine
from d2f_runtime.engine.opening import open_engine
from d2f_runtime.models.manifest import read_manifest, verify_files
from d2f_stream.core.session import Result

PACKAGE = Path(__file__).parents[2] / "models" / "smollm2-135m-d2f"
FOLDER = PACKAGE / "smollm2_135m_d2f" / "model"
MAX_BYTES = 95_000_000
MOST = 256  # tokens of an answer
GRAM, REPEATS = 8, 4  # so many tokens in a row, seen more often than this, are a loop

QUESTIONS = [
    "Who are you?",
    "Tell me a joke.",
    "What is the capital of France?",
    "Write a Python function that reverses a list.",
    "Summarise this: The cat sat on the mat and slept all day.",
    "Translate to French: Good morning.",
    "Why is the sky blue?",
    "Tom has 34 books and buys 18 more. How many books does he have?",
    "Give me tips for sleep.",
    "Write an email to my boss about a day off.",
]

pytestmark = pytest.mark.skipif(
    not (FOLDER / "manifest.json").is_file(),
    reason="the model package holds no model; models/smollm2-135m-d2f/build makes it",
)


@pytest.fixture(scope="module")
def answers() -> tuple[list[Result], list[Result]]:
    """All answers, as the model is shipped and token by token."""
    return asyncio.run(_answer())


async def _answer() -> tuple[list[Result], list[Result]]:
    async with open_engine(FOLDER) as engine:
        assert engine.defaults.commit == "verify"
        assert engine.defaults.block_size > 1
        return await _all(engine), await _all(engine, block_size=1, commit="filled")


async def _all(engine: LocalEngine, **overrides: object) -> list[Result]:
    return [
        await engine.generate(
            [{"role": "user", "content": question}],
            max_new_tokens=MOST,
            temperature=0.0,
            **overrides,  # type: ignore[arg-type]
        ).result()
        for question in QUESTIONS
    ]


def test_the_package_is_whole_and_small_enough() -> None:
    verify_files(FOLDER, read_manifest(FOLDER))
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", range(len(QUESTIONS)), ids=QUESTIONS)
def test_a_first_question_is_answered(
    number: int, answers: tuple[list[Result], list[Result]]
) -> None:
    verified, ordinary = (each[number] for each in answers)
    assert verified.text.strip()
    assert verified.reason == "eos" or len(verified.token_ids) == MOST
    assert verified.reason in ("eos", "length")
    assert not _turns_in_circles(verified.token_ids)
    assert verified.token_ids == ordinary.token_ids
    assert verified.usage.steps < ordinary.usage.steps


def test_it_knows_what_everybody_knows(answers: tuple[list[Result], list[Result]]) -> None:
    verified, _ = answers
    assert "Paris" in verified[QUESTIONS.index("What is the capital of France?")].text
    assert "def " in verified[QUESTIONS.index("Write a Python function that reverses a list.")].text


def _turns_in_circles(tokens: Sequence[int]) -> bool:
    grams = Counter(tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1))
    return max(grams.values(), default=0) > REPEATS
