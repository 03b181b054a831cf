"""The canvas, drawn to a recording console and read back as text."""

import io

import msgspec
import pytest

pytest.importorskip("rich")

from rich.console import Console

from d2f_stream.core.errors import InvalidPrompt
from d2f_stream.core.events import (
    Block,
    Draft,
    Event,
    FinishReason,
    StreamFailed,
    StreamFinished,
    StreamStarted,
    Timings,
    Usage,
)
from d2f_stream.terminal.canvas import Canvas, LiveCanvas, last_sentence

STARTED = StreamStarted(stream="s", seq=0, request_id="r", model="m", block_size=4, prompt_tokens=3)


def block(index: int, text: str) -> Block:
    return Block(
        stream="s",
        seq=index + 1,
        index=index,
        start=4 * index,
        stop=4 * index + 4,
        text=text,
        token_ids=(1, 2, 3, 4),
        steps=2 * (index + 1),
        elapsed_ms=100.0,
    )


def draft(index: int, *texts: str) -> Draft:
    """Build a draft in which an empty text stands for a mask."""
    filled = tuple(bool(text) for text in texts)
    return Draft(stream="s", index=index, text="".join(texts), filled=filled, texts=texts)


def finished(reason: FinishReason = "eos") -> StreamFinished:
    return StreamFinished(
        stream="s",
        seq=9,
        reason=reason,
        text_length=20,
        usage=Usage(prompt_tokens=3, completion_tokens=12, steps=5),
        timings=Timings(first_block_ms=50.0, total_ms=200.0),
    )


def drawn(
    *events: Event,
    question: str = "How many?",
    width: int = 80,
    height: int = 24,
    closed: bool = False,
    color: bool = False,
) -> str:
    canvas = Canvas(question)
    for event in events:
        canvas.apply(event)
    if closed:
        canvas.close()
    console = Console(
        file=io.StringIO(), width=width, height=height, force_terminal=True, record=True
    )
    console.print(canvas)
    return console.export_text(styles=color)


def test_canvas_before_the_stream_says_that_the_model_loads() -> None:
    text = drawn()
    assert "How many?" in text
    assert "loading the model" in text


def test_masks_are_cells_and_drafts_stand_in_their_places() -> None:
    text = drawn(STARTED, draft(0, "", " is", "", " 8"))
    assert "░ is░ 8" in text


def test_blocks_next_to_each_other_have_different_cells() -> None:
    text = drawn(STARTED, draft(0, "a", "", ""), draft(1, "", "", "b"))
    assert "a░░▒▒b" in text


def test_committed_block_replaces_its_draft_and_leaves_later_ones() -> None:
    text = drawn(STARTED, draft(0, "", "x"), draft(1, "", "y"), block(0, " Two and"))
    assert "Two and▒y" in text


def test_late_draft_of_a_committed_block_is_ignored() -> None:
    assert "░" not in drawn(STARTED, block(0, "Two"), draft(0, "", ""))


def test_draft_without_positions_shows_its_text() -> None:
    assert "maybe" in drawn(STARTED, Draft(stream="s", index=0, text="maybe"))


def test_neighbouring_blocks_differ_in_style() -> None:
    text = drawn(STARTED, block(0, "one "), block(1, "two"), color=True)
    assert "\x1b[39mone \x1b[0m\x1b[36mtwo\x1b[0m" in text


def test_running_canvas_counts_blocks_tokens_and_steps() -> None:
    assert "1 block · 4 tokens · 2 steps · 0.10 s" in drawn(STARTED, block(0, "one"))


def test_finished_canvas_ends_with_answer_and_figures() -> None:
    started = msgspec.structs.replace(STARTED, model="word-problems")
    events = (block(0, "2 + 6 = 8. "), block(1, "The answer is 8."), finished())
    lines = drawn(started, *events, closed=True).rstrip().splitlines()
    assert lines[-2:] == [
        "answer The answer is 8.",
        "2 blocks · 5 steps · 2.4 tokens/step · first block 0.05 s · 60 tokens/s",
    ]
    assert "\nanswer" not in drawn(STARTED, *events, closed=True)


def test_finished_canvas_drops_drafts_after_the_end() -> None:
    assert "▒" not in drawn(STARTED, block(0, "8."), draft(1, "", ""), finished(), closed=True)


@pytest.mark.parametrize(
    ("reason", "sentence"),
    [
        ("length", "cut off: max_new_tokens is reached"),
        ("stop", "ended by a stop string"),
        ("cancelled", "cancelled"),
    ],
)
def test_finished_canvas_says_what_ended_the_answer_early(
    reason: FinishReason, sentence: str
) -> None:
    text = drawn(STARTED, block(0, "8."), finished(reason), closed=True)
    assert text.rstrip().endswith(sentence)


def test_canvas_closed_in_the_middle_says_cancelled_and_keeps_what_is_final() -> None:
    text = drawn(STARTED, block(0, "one"), draft(1, "x", ""), closed=True)
    assert "cancelled after 1 block" in text
    assert "one\n" in text


def test_failed_stream_is_marked() -> None:
    failed = StreamFailed(stream="s", seq=2, code="engine_failed", message="boom")
    assert "failed after 1 block" in drawn(STARTED, block(0, "one"), failed, closed=True)


def test_narrow_terminal_has_no_frame_and_no_line_is_too_long() -> None:
    events = (STARTED, block(0, "word " * 40), finished())
    lines = drawn(*events, question="why " * 20, width=40, closed=True).splitlines()
    assert not any("╭" in line for line in lines)
    assert max(len(line) for line in lines) <= 40


def test_wide_terminal_keeps_lines_readable() -> None:
    lines = drawn(STARTED, block(0, "word " * 100), width=240).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 100


@pytest.mark.parametrize("height", [6, 12, 24])
def test_running_tall_answer_shows_its_end_within_the_terminal(height: int) -> None:
    answer = "\n".join(f"line {number}" for number in range(100))
    text = drawn(STARTED, block(0, answer), question="long " * 200, height=height)
    assert len(text.splitlines()) <= height
    assert "line 99" in text


def test_closed_tall_answer_is_complete() -> None:
    answer = "\n".join(f"line {number}" for number in range(100))
    text = drawn(STARTED, block(0, answer), finished(), height=10, closed=True)
    assert all(f"line {number}\n" in text for number in range(100))


def test_escape_sequences_of_a_model_are_not_drawn() -> None:
    text = drawn(STARTED, block(0, "a\x1b]0;title\x07b"), draft(1, "\x9bK", ""), color=True)
    assert "a]0;titleb" in text


def test_ascii_terminal_gets_ascii_masks() -> None:
    canvas = Canvas("How many?")
    canvas.apply(draft(0, "a", "", "b"))
    output = io.BytesIO()
    file = io.TextIOWrapper(output, encoding="ascii", errors="replace")
    Console(file=file, width=80).print(canvas)
    file.flush()
    assert b"\na.b\n" in output.getvalue()


def test_no_color_leaves_no_colour_codes() -> None:
    file = io.StringIO()
    canvas = Canvas("How many?")
    for event in (STARTED, block(0, "one "), block(1, "two"), draft(2, "x", "")):
        canvas.apply(event)
    Console(file=file, width=80, force_terminal=True, no_color=True).print(canvas)
    assert "\x1b[3" not in file.getvalue()
    assert "\x1b[9" not in file.getvalue()


def test_live_canvas_hides_the_cursor_and_shows_it_again() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, height=24, force_terminal=True)
    with LiveCanvas("How many?", console=console) as live:
        live.apply(STARTED)
        live.apply(block(0, "8."))
        live.apply(finished())
        assert "\x1b[?25h" not in file.getvalue()
    assert file.getvalue().index("\x1b[?25l") < file.getvalue().index("\x1b[?25h")


def test_live_canvas_leaves_an_interrupted_answer_on_the_screen() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, height=24, force_terminal=True)

    def interrupted() -> None:
        with LiveCanvas("How many?", console=console) as live:
            live.apply(block(0, "8."))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.getvalue().endswith("\x1b[?25h")
    assert "cancelled after 1 block" in file.getvalue()


def test_live_canvas_of_a_rejected_request_is_wiped() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, height=24, force_terminal=True)
    with pytest.raises(InvalidPrompt), LiveCanvas("How many?", console=console):
        raise InvalidPrompt("no")
    last_frame = file.getvalue().rpartition("\x1b[?25h")[2]
    assert "How many?" not in last_frame


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("2 + 6 = 8. The answer is 8.", "The answer is 8."),
        ("first line\nsecond line\n\n", "second line"),
        ("Pi is 3.14", "Pi is 3.14"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_last_sentence(text: str, sentence: str) -> None:
    assert last_sentence(text) == sentence
