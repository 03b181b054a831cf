import re
import subprocess
import sys
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import d2f_export
from lab.embedded_model.cast import ITEMS, PEOPLE
from lab.embedded_model.frames import CLOSINGS, DISTRACTORS, OPENINGS
from lab.embedded_model.phrasings import ADDITIONS, DIVISIONS, MULTIPLICATIONS, SUBTRACTIONS
from lab.embedded_model.plans import MAX_OPERATIONS, draw_plan
from lab.embedded_model.problems import (
    Problem,
    extract_answer,
    generate,
    is_correct,
    is_held_out,
    problems,
    write,
)

EQUATION = re.compile(r"(\d+) ([-+x/]) (\d+) = (\d+) (\w+)")
CALCULATE = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "x": lambda left, right: left * right,
    "/": lambda left, right: left / right,
}
PLURALS = {item.plural for item in ITEMS}
SINGULARS = {item.singular for item in ITEMS}


@pytest.fixture(scope="module")
def sample() -> list[Problem]:
    rng = Random(0)
    return [generate(rng) for _ in range(4000)]


def test_every_equation_is_right_and_within_bounds(sample: list[Problem]) -> None:
    for problem in sample:
        for left, symbol, right, result, _ in EQUATION.findall(problem.answer):
            assert CALCULATE[symbol](int(left), int(right)) == int(result), problem
            assert all(1 <= int(number) <= 999 for number in (left, right, result)), problem


def test_equations_form_a_chain_from_the_first_number_to_the_result(sample: list[Problem]) -> None:
    for problem in sample:
        equations = EQUATION.findall(problem.answer)
        assert len(equations) == problem.num_operations
        assert all(before[3] == after[0] for before, after in pairwise(equations)), problem
        opening = problem.answer.partition(".")[0]
        assert re.findall(r"\d+", opening) == [equations[0][0]], problem
        assert equations[-1][3] == str(problem.result)
        assert problem.answer.endswith(f" The answer is {problem.result}.")


def test_objects_agree_in_number_with_the_result(sample: list[Problem]) -> None:
    for problem in sample:
        for *_, result, noun in EQUATION.findall(problem.answer):
            assert noun in (SINGULARS if result == "1" else PLURALS), problem


def test_questions_are_clean_sentences(sample: list[Problem]) -> None:
    for problem in sample:
        text = f"{problem.question} {problem.answer}"
        assert text.isascii()
        assert not re.search(r"[{}]|  |\.\.|\b1 \w+s\b|[.?] [a-z0-9]", text), text
        assert problem.question[0].isupper()
        assert problem.question[-1] in "?."


def test_numbers_of_operations_are_uniform(sample: list[Problem]) -> None:
    counts = Counter(problem.num_operations for problem in sample)
    assert sorted(counts) == [2, 3, 4, 5, 6]
    # 800 expected, standard deviation 25.
    assert all(680 < count < 920 for count in counts.values())


def test_a_fifth_of_the_questions_has_a_distractor(sample: list[Problem]) -> None:
    assert 0.17 < sum(problem.has_distractor for problem in sample) / len(sample) < 0.23


def test_the_distractor_is_in_the_question_and_changes_nothing_else() -> None:
    rng = Random(1)
    plans = [plan for plan in (draw_plan(rng) for _ in range(1500)) if plan.aside]
    assert len(plans) > 200
    for plan in plans:
        told = write(plan, key=plan.key)
        aside, plan.aside = plan.aside, None
        untold = write(plan, key=plan.key)
        assert aside is not None
        assert fixed_part(aside.distractor.question) in told.question
        assert re.search(rf"\b{aside.number}\b", told.question)
        assert len(re.findall(r"\d+", told.question)) == 1 + len(
            re.findall(r"\d+", untold.question)
        )
        assert (told.answer, told.key) == (untold.answer, untold.key)


def fixed_part(template: str) -> str:
    """Take the longest part of a template that has no slot in it, without its first letter."""
    return max(re.split(r"\{\w+\}", template), key=len)[1:]


def test_the_answer_is_decided_by_the_plan() -> None:
    rng = Random(2)
    for _ in range(200):
        plan = draw_plan(rng)
        assert write(plan, key=plan.key) == write(plan, key=plan.key)


def test_equal_keys_give_equal_equations() -> None:
    by_key: dict[str, list[tuple[str, ...]]] = {}
    for problem in islice(problems(3, split="train"), 3000):
        numbers = [found[:4] for found in EQUATION.findall(problem.answer)]
        assert by_key.setdefault(problem.key, numbers) == numbers


def test_the_splits_share_no_key() -> None:
    train = {problem.key for problem in islice(problems(4, split="train"), 5000)}
    held_out = {problem.key for problem in islice(problems(4, split="held_out"), 150)}
    assert not train & held_out


def test_every_problem_of_a_split_is_on_its_side_of_the_hash() -> None:
    assert not any(map(is_held_out, islice(problems(5, split="train"), 1000)))
    assert all(map(is_held_out, islice(problems(5, split="held_out"), 100)))


def test_one_in_64_problems_is_held_out(sample: list[Problem]) -> None:
    # 62 expected, standard deviation 8.
    assert 30 < sum(map(is_held_out, sample)) < 95


def test_a_seed_reproduces_its_problems_in_another_process() -> None:
    code = (
        "from itertools import islice; from lab.embedded_model.problems import problems;"
        "print([p for p in islice(problems(6, split='train'), 20)])"
    )
    package = Path(d2f_export.__file__).parents[1]
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(package), "PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == str(list(islice(problems(6, split="train"), 20)))


def test_different_seeds_give_different_problems() -> None:
    first, second = (next(problems(seed, split="train")) for seed in (7, 8))
    assert first != second


def test_the_wording_is_varied() -> None:
    assert len(OPENINGS) >= 8
    assert len(CLOSINGS) >= 8
    assert len(DISTRACTORS) >= 12
    assert min(len(PEOPLE), len(ITEMS)) >= 36
    for pool in (ADDITIONS, SUBTRACTIONS, MULTIPLICATIONS, DIVISIONS):
        assert len({phrasing.question for phrasing in pool}) == len(pool) >= 10


@pytest.mark.parametrize("operand", range(2, 13))
def test_enough_phrasings_fit_any_operand(operand: int) -> None:
    # Phrasings are not used twice in a problem, so fewer than this could leave none to draw.
    for pool in (ADDITIONS, SUBTRACTIONS, MULTIPLICATIONS, DIVISIONS):
        fitting = [it for it in pool if it.low <= operand and it.high == 999 and it.only is None]
        assert len(fitting) + sum(it.high == operand for it in pool) >= MAX_OPERATIONS


def test_the_last_sentence_with_an_answer_counts() -> None:
    assert extract_answer("The answer is 3. No: The answer is 42.") == 42


@pytest.mark.parametrize("text", ["", "The answer is", "The answer is x.", "the answer: 3"])
def test_no_answer_is_found_in_other_text(text: str) -> None:
    assert extract_answer(text) is None


@settings(max_examples=50)
@given(st.text())
def test_any_text_may_be_searched_for_an_answer(text: str) -> None:
    extract_answer(f"The answer is {text}")


def test_endless_digits_are_no_answer() -> None:
    assert extract_answer("The answer is " + "7" * 5000) is None


def test_correct_means_the_right_number(sample: list[Problem]) -> None:
    for problem in sample[:100]:
        assert is_correct(problem, problem.answer)
        assert not is_correct(problem, f"The answer is {problem.result + 1}.")
