"""Seeded generator of grade-school word problems with worked solutions.

Owns the writing of a plan as question and answer, the split into training and held-out problems
and the check of an answer. Numbers are drawn in plans.py; the English is in phrasings.py.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Final, Literal

from lab.embedded_model.frames import CLOSINGS, OPENINGS
from lab.embedded_model.plans import Plan, Step, draw_plan

Split = Literal["train", "held_out"]
HELD_OUT_ONE_IN: Final = 64

# At most nine digits: int() refuses very long numbers, which a bad model may well write.
_ANSWER_PATTERN: Final = re.compile(r"The answer is ([0-9]{1,9})(?![0-9])")
# After another change, "them" could mean the objects that just came or went.
_THEM: Final = {"": "them", "-": "the rest"}
_REDUCING: Final = ("-", "/")


@dataclass(frozen=True, slots=True)
class Problem:
    """A word problem, its worked solution and the key of its combination (see `Plan.key`)."""

    question: str
    answer: str
    result: int
    num_operations: int
    has_distractor: bool
    key: str


def generate(rng: Random) -> Problem:
    """Draw one problem, from either split."""
    plan = draw_plan(rng)
    return write(plan, key=plan.key)


def problems(seed: int, *, split: Split) -> Iterator[Problem]:
    """Draw problems of one split without end; equal seeds give equal problems."""
    rng = Random(seed)
    wants_held_out = split == "held_out"
    while True:
        plan = draw_plan(rng)
        key = plan.key
        if _is_held_out(key) == wants_held_out:
            yield write(plan, key=key)


def is_held_out(problem: Problem) -> bool:
    """Tell whether the problem's combination, one in 64, is kept from training."""
    return _is_held_out(problem.key)


def extract_answer(text: str) -> int | None:
    """Find the number of the last "The answer is N", if there is one."""
    found = _ANSWER_PATTERN.findall(text)
    return int(found[-1]) if found else None


def is_correct(problem: Problem, text: str) -> bool:
    """Tell whether a written solution ends at the right number."""
    return extract_answer(text) == problem.result


def write(plan: Plan, *, key: str) -> Problem:
    """Write a plan out; equal plans give equal text."""
    result = plan.steps[-1].after
    words = _words(plan)
    opening = OPENINGS[plan.opening]
    question = opening.question.format_map(words)
    answer = [opening.answer.format_map(words)]
    previous = ""
    for index, step in enumerate(plan.steps):
        if plan.aside and plan.aside.before_step == index:
            question += f". {_aside(plan, words)}"
            previous = "aside"
        _fill(words, plan, step, previous)
        clause = step.choice.phrasing.question.format_map(words)
        question += _connect(clause, step, previous)
        answer.append(step.choice.phrasing.answer.format_map(words))
        previous = step.symbol
    answer.append(f"The answer is {result}.")
    return Problem(
        question=f"{question}. {CLOSINGS[plan.closing].format_map(words)}",
        answer=" ".join(answer),
        result=result,
        num_operations=len(plan.steps),
        has_distractor=plan.aside is not None,
        key=key,
    )


def _words(plan: Plan) -> dict[str, str]:
    person = plan.person
    return {
        "name": person.name,
        "he": person.he,
        "him": person.him,
        "his": person.his,
        "He": person.he.capitalize(),
        "His": person.his.capitalize(),
        "friend": plan.friend,
        "obj": plan.item.singular,
        "objs": plan.item.plural,
        "rel": plan.relation,
        "a": str(plan.start),
    }


def _fill(words: dict[str, str], plan: Plan, step: Step, previous: str) -> None:
    item = plan.item
    words["them"] = _THEM.get(previous) or f"{plan.person.his} {item.plural}"
    words["times"] = "twice" if step.operand == 2 else f"{step.operand} times"
    words["b"] = str(step.operand)
    words["rel"] = step.relation
    words["eq"] = f"{step.before} {step.symbol} {step.operand} = {step.after}"
    words["o"] = item.singular if step.after == 1 else item.plural


def _connect(clause: str, step: Step, previous: str) -> str:
    if step.is_joined:
        contrasts = (step.symbol in _REDUCING) != (previous in _REDUCING)
        return f", {'but' if contrasts else 'and'} then {clause}"
    sentence = step.lead + clause
    return f". {sentence[0].upper()}{sentence[1:]}"


def _aside(plan: Plan, words: dict[str, str]) -> str:
    aside = plan.aside
    assert aside is not None
    words["d"] = str(aside.number)
    words["rel"] = aside.relation
    sentence = aside.distractor.question.format_map(words)
    return sentence[0].upper() + sentence[1:]


def _is_held_out(key: str) -> bool:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0
