"""Tables within the width of a terminal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2f_stream.terminal.table import table, width_here, wrapped

ROWS = [("name", "size", "from"), ("sdar:4b", "4.41 B", "JetLM/SDAR-4B-Chat, which chats a lot")]


def test_table_that_fits_is_in_columns() -> None:
    head, row = table(ROWS, width=80).splitlines()
    assert head == "name     size    from"
    assert row == "sdar:4b  4.41 B  JetLM/SDAR-4B-Chat, which chats a lot"
    assert table(ROWS) == table(ROWS, width=80)


def test_widest_column_is_wrapped_where_the_terminal_is_narrower() -> None:
    assert table(ROWS, width=38).splitlines() == [
        "name     size    from",
        "sdar:4b  4.41 B  JetLM/SDAR-4B-Chat,",
        "                 which chats a lot",
    ]


def test_rows_are_stacked_with_their_names_where_columns_do_not_fit() -> None:
    assert table(ROWS, width=26).splitlines() == [
        "sdar:4b",
        "  size 4.41 B, from",
        "  JetLM/SDAR-4B-Chat,",
        "  which chats a lot",
    ]


@given(
    st.lists(st.tuples(*[st.text("ab :", max_size=40).map(str.strip)] * 3), min_size=1),
    st.integers(30, 120),
)
def test_no_line_is_wider_than_the_terminal_and_no_word_is_lost(
    rows: list[tuple[str, str, str]], width: int
) -> None:
    rows = [(first[:12], second, third) for first, second, third in rows]
    shown = table([("", "", ""), *rows], width=width)
    assert all(len(line) <= width for line in shown.splitlines())
    letters = sorted("".join(map("".join, rows)).replace(" ", ""))
    assert sorted("".join(shown.replace(",", "").split())) == letters


def test_paragraphs_stay_apart() -> None:
    assert wrapped("one two\n\nthree", width=4, indent=" ") == "one\n two\n\nthre\n e"


def test_two_columns_stay_columns_and_names_are_not_cut_at_hyphens() -> None:
    facts = [("repository", "JetLM/SDAR-4B-Chat"), ("what for", "small-talk and simple-questions")]
    assert table(facts, width=30).splitlines() == [
        "repository  JetLM/SDAR-4B-Chat",
        "what for    small-talk and",
        "            simple-questions",
    ]
    assert table(facts, width=25).splitlines()[:2] == [
        "repository  JetLM/SDAR-4B",
        "            -Chat",
    ]


def test_width_is_that_of_columns_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert width_here() is None
    monkeypatch.setenv("COLUMNS", "50")
    assert width_here() == 50
