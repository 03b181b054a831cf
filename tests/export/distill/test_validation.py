import pytest

from d2f_export.distill.validation import is_right

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(
    ("text", "expected", "score", "pattern", "right"),
    [
        (" 3 + 4 = 7\n", "3 + 4 = 7", "exact", None, True),
        ("3 + 4 = 7.", "3 + 4 = 7", "exact", None, False),
        ("so 3 + 4 = 7.", "3 + 4 = 7 ", "contains", None, True),
        ("so 3 + 4 = 8.", "3 + 4 = 7", "contains", None, False),
        ("1 then 2\n#### 42", "other words\n#### 42", "regex", r"#### (-?\d+)", True),
        ("#### 41 no, #### 42", "#### 42", "regex", r"#### (-?\d+)", True),
        ("42", "#### 42", "regex", r"#### (-?\d+)", False),
        ("it is 7", "7", "regex", r"\d+", True),
    ],
)
def test_an_answer_is_right_when(
    text: str, expected: str, score: str, pattern: str | None, right: bool
) -> None:
    assert is_right(text, expected, score=score, pattern=pattern) == right  # type: ignore[arg-type]
