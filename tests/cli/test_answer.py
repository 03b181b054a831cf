"""An answer of the chat, drawn to a recorded terminal: settled Markdown, and its live canvas."""

import io
from collections.abc import Iterable

import pytest

pytest.importorskip("rich")

from rich.console import Console

from d2f_stream.core.events import (
    Block,
    Draft,
    Event,
    FinishReason,
    StreamFinished,
    StreamStarted,
    Timings,
    Usage,
)
from d2f_stream.terminal.answer import Answer

STARTED = StreamStarted(stream="s", seq=0, request_id="r", model="m", block_size=4, prompt_tokens=3)
HEADING = "# A title\n\nIt is "


def block(index: int, text: str) -> Block:
    return Block(
        stream="s", seq=index + 1, index=index, start=4 * index, stop=4 * index + 4, text=text,
        token_ids=(1, 2, 3, 4), steps=index + 1, elapsed_ms=100.0,
    )  # fmt: skip


def draft(index: int, *texts: str) -> Draft:
    """Build a draft in which an empty text stands for a mask."""
    filled = tuple(bool(text) for text in texts)
    return Draft(stream="s", index=index, text="".join(texts), filled=filled, texts=texts)


def finished(reason: FinishReason = "eos") -> StreamFinished:
    usage = Usage(prompt_tokens=3, completion_tokens=8, steps=4)
    timings = Timings(first_block_ms=50.0, total_ms=200.0)
    return StreamFinished(
        stream="s", seq=9, reason=reason, text_length=20, usage=usage, timings=timings
    )


class Screen:
    """What a terminal received; `frames` are what was written at each event."""

    def __init__(
        self, events: Iterable[Event], *, canvas: bool, width: int = 38, height: int = 24
    ) -> None:
        file = io.StringIO()
        console = Console(file=file, width=width, height=height, force_terminal=True)
        self.frames: list[str] = []
        answer = Answer(console, canvas=canvas)
        with answer:
            for event in events:
                start = len(file.getvalue())
                answer._drawn_at = 0.0  # each draft is a frame of its own
                answer.apply(event)
                self.frames.append(_plain(file.getvalue()[start:]))
        self.text = _plain(file.getvalue())


def _plain(written: str) -> str:
    from rich.text import Text

    return Text.from_ansi(written).plain


def test_blocks_are_filled_in_behind_the_text_and_markdown_settles_above() -> None:
    events: list[Event] = [STARTED, block(0, HEADING), draft(1, "", "true", ""), draft(2, "", "?")]
    events += [block(1, "very true."), finished()]
    _, heading, first, second, whole, end = Screen(events, canvas=True).frames
    assert "A title" in heading
    assert "#" not in heading.partition("A title")[2]
    assert "It is ▒true▒" in first
    assert "It is ▒true▒░?" in second
    assert "It is very true.░?" in whole
    assert "░" not in end
    assert "8 tokens, 2.0 a step" in end


def test_drafts_leave_no_trace_without_the_canvas() -> None:
    events: list[Event] = [
        STARTED,
        block(0, HEADING),
        draft(1, "", "true", ""),
        block(1, "so."),
        finished(),
    ]
    screen = Screen(events, canvas=False)
    assert screen.frames[2] == ""
    assert "▒" not in screen.text


@pytest.mark.parametrize("height", [3, 8, 24])
def test_canvas_of_a_long_paragraph_shows_its_end_within_a_narrow_terminal(height: int) -> None:
    events: list[Event] = [STARTED, block(0, "word " * 400), draft(1, "", "end", "")]
    frame = Screen(events, canvas=True, height=height).frames[-1]
    lines = [line.rstrip() for line in frame.splitlines() if line.strip()]
    assert "▒end▒" in lines[-1]
    assert len(lines) <= max(height - 2, 1)
    assert max(len(line) for line in lines) <= 38


def test_stopped_answer_keeps_what_was_final_and_no_masks() -> None:
    events: list[Event] = [
        STARTED,
        block(0, "It is "),
        draft(1, "", "", "so"),
        finished("cancelled"),
    ]
    end = Screen(events, canvas=True).frames[-1]
    assert "It is" in end
    assert "▒" not in end
    assert "stopped" in end


def test_escape_sequences_of_a_draft_are_not_drawn() -> None:
    frame = Screen([STARTED, draft(0, "a\x1b]0;title\x07b", "")], canvas=True).frames[-1]
    assert "a]0;titleb░" in frame
