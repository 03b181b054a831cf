"""Graders: right answers pass, wrong and hostile ones do not."""

import pytest

from lab.bench.graders import CodeProblem, WordProblem, grade

HEAD = 'def double(x: int) -> int:\n    """ Twice x. """\n'
PROBLEM = CodeProblem(HEAD, "double", "def check(f):\n    assert f(4) == 8\n")


@pytest.mark.parametrize("fence", ["```python\n", "```\n", "```py\n", "```\npython\n"])
def test_a_program_in_any_fence_is_run(fence: str) -> None:
    assert PROBLEM.is_right(f"Sure.\n{fence}def double(x):\n    return 2 * x\n```\nDone.")


@pytest.mark.parametrize(
    "body",
    [
        "return x + 2",
        "raise SystemExit(0) or x",
        "return [0] * 10**11",
        "import os\n    return os.fork() * 0 + 7",
        "return",
        "return 2 *",
    ],
)
def test_a_wrong_program_is_wrong(body: str) -> None:
    assert not PROBLEM.is_right(f"```python\ndef double(x):\n    {body}\n```")


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("so \\boxed{1,234}", True),
        ("first \\boxed{5}, then \\boxed{1234.0}", True),
        ("\\boxed{\\$1234}", True),
        ("it is 1234", True),
        ("1234 or \\boxed{5}", False),
        ("", False),
    ],
)
def test_numbers_are_read_out_of_boxes(answer: str, is_right: bool) -> None:
    problem = WordProblem.of("How many?", "he has 1,000 + 234 <<1000+234=1234>>\n#### 1,234")
    assert problem.number == 1234
    assert grade([problem], [answer]) == [is_right]
