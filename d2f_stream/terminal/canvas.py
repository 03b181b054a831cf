"""The live canvas of the command line: an answer as a person sees it being denoised.

Owns what one stream looks like in a terminal: the question, the answer position by position and a
line of figures. It is fed with events and knows nothing of engines, sessions or arguments. Needs
rich; the command line imports this module only where rich is installed.
"""

import re
import time
from typing import Final, Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from d2f_stream.core.events import Block, Draft, Event, StreamFailed, StreamFinished, StreamStarted
from d2f_stream.terminal.views import printable

__all__ = ["FRAME_S", "Canvas", "Drafts", "LiveCanvas", "last_sentence"]

# Blocks alternate between two looks, so that their edges can be seen without a mark between them.
COMMITTED_STYLES: Final = ("default", "cyan")
DRAFT_STYLES: Final = ("dim default", "dim cyan")
MASK_STYLE: Final = "bright_black"
MASK_CELLS: Final = ("░", "▒")
ASCII_MASK_CELLS: Final = (".", ":")
NARROW: Final = 48  # columns; below it the question goes without a frame
WIDEST: Final = 100  # columns; longer lines are hard to read
LOW: Final = 10  # rows; below it a running canvas goes without the question
STATUS_LINES: Final = 3  # kept free below the answer: a blank line and the wrapped figures
FRAME_S: Final = 1 / 30  # drafts within one frame are drawn together

COUNTS: Final = "word-problems"  # the model whose last sentence is what was asked for

_SENTENCE_END: Final = re.compile(r"(?<=[.!?])\s+|\n+")


def last_sentence(text: str) -> str:
    """Return the last sentence or line of a text; empty for an empty text."""
    sentences = [part.strip() for part in _SENTENCE_END.split(text)]
    return next((part for part in reversed(sentences) if part), "")


class Drafts:
    """What is not final yet of an answer, position by position; `apply` feeds it."""

    def __init__(self) -> None:
        self._num_committed = 0
        self._drafts: dict[int, Draft] = {}

    def apply(self, event: Event) -> None:
        """Take in the next event of the stream; a block ends its draft, the end all of them."""
        match event:
            case Draft() if event.index >= self._num_committed:
                self._drafts[event.index] = event
            case Block():
                self._num_committed = event.index + 1
                self._drafts.pop(event.index, None)
            case StreamFinished() | StreamFailed():
                self.clear()
            case _:
                pass

    def clear(self) -> None:
        """Drop them all."""
        self._drafts.clear()

    def append_to(self, answer: Text, *, ascii_only: bool) -> None:
        """Draw them behind what is final."""
        cells = ASCII_MASK_CELLS if ascii_only else MASK_CELLS
        for index, draft in sorted(self._drafts.items()):
            style = DRAFT_STYLES[index % 2]
            if not draft.filled:
                answer.append(printable(draft.text), style=style)
            for is_filled, text in zip(draft.filled, draft.texts, strict=True):
                if is_filled:
                    answer.append(printable(text), style=style)
                else:
                    answer.append(cells[index % 2], style=MASK_STYLE)


class Canvas:
    """A rich renderable of one stream; `apply` feeds it, rich draws it.

    While the stream runs the drawing fits the terminal's height and shows the answer's end; once
    `close` was called it is complete.

    Args:
        question: the prompt, shown above the answer.
    """

    def __init__(self, question: str) -> None:
        self._question = printable(question.strip())
        self._started: StreamStarted | None = None
        self._committed: list[Block] = []
        self._drafts = Drafts()
        self._end: StreamFinished | StreamFailed | None = None
        self._closed = False

    def apply(self, event: Event) -> None:
        """Take in the next event of the stream."""
        self._drafts.apply(event)
        match event:
            case StreamStarted():
                self._started = event
            case Block():
                self._committed.append(event)
            case StreamFinished() | StreamFailed():
                self._end = event
            case _:
                pass

    def close(self) -> None:
        """Draw all that is final from now on, whatever the terminal's height. Idempotent."""
        self._closed = True
        self._drafts.clear()

    @property
    def text(self) -> str:
        """The committed text."""
        return "".join(block.text for block in self._committed)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw question, answer and figures, cut to the terminal's height while running."""
        options = options.update(width=min(options.max_width, WIDEST))
        width = options.max_width
        room = None if self._closed else max(options.size.height - 1, 4)
        is_low = room is not None and room < LOW
        question = [] if is_low else self._draw_question(console, width, room)
        yield from question
        answer = self._answer(ascii_only=options.ascii_only)
        lines = list(answer.wrap(console, width))
        if room is not None:
            used = sum(len(console.render_lines(part, options, pad=False)) for part in question)
            lines = lines[-max(room - used - STATUS_LINES, 1) :]
        yield from lines
        yield from self._draw_figures()

    def _draw_question(self, console: Console, width: int, room: int | None) -> list[Panel | Text]:
        """Frame the question; long ones are cut to a third of the height while running."""
        text = Text(self._question, style="bold")
        is_narrow = width < NARROW
        lines = text.wrap(console, width if is_narrow else width - 4)
        limit = len(lines) if room is None else max(room // 3 - 2, 1)
        shown = Text("\n").join(lines[:limit])
        if len(lines) > limit:
            shown.append("\n…" if limit > 1 else " …")
        if is_narrow:
            return [shown, Text()]
        frame = Panel(
            shown, title="question", title_align="left", border_style="bright_black", width=width
        )
        return [frame]

    def _answer(self, *, ascii_only: bool) -> Text:
        answer = Text()
        for block in self._committed:
            text = printable(block.text)
            if not answer.plain:
                text = text.lstrip()
            answer.append(text, style=COMMITTED_STYLES[block.index % 2])
        self._drafts.append_to(answer, ascii_only=ascii_only)
        return answer

    def _draw_figures(self) -> list[Text]:
        match self._end:
            case StreamFinished():
                return self._summary(self._end)
            case StreamFailed():
                return [Text(f"\nfailed after {self._progress()}", style="red")]
            case None if self._closed:
                return [Text(f"\ncancelled after {self._progress()}", style="yellow")]
            case None if self._started is None:
                return [Text("\nloading the model", style="dim")]
            case _:
                return [Text(f"\n{self._progress()}", style="dim")]

    def _progress(self) -> str:
        if not self._committed:
            return _counted(0, "block")
        last = self._committed[-1]
        parts = (
            _counted(len(self._committed), "block"),
            _counted(last.stop, "token"),
            _counted(last.steps, "step"),
            f"{last.elapsed_ms / 1000:.2f} s",
        )
        return " · ".join(parts)

    def _summary(self, end: StreamFinished) -> list[Text]:
        usage, timings = end.usage, end.timings
        parts = [
            _counted(len(self._committed), "block"),
            _counted(usage.steps, "step"),
            f"{usage.tokens_per_step:.1f} tokens/step",
        ]
        if timings.first_block_ms is not None:
            parts.append(f"first block {timings.first_block_ms / 1000:.2f} s")
        if timings.total_ms > 0:
            parts.append(f"{usage.completion_tokens / timings.total_ms * 1000:.0f} tokens/s")
        lines = [Text(" · ".join(parts), style="dim")]
        if end.reason != "eos":
            lines.append(Text(_REASONS[end.reason], style="yellow"))
        counts = self._started is not None and self._started.model == COUNTS
        if counts and (answer := last_sentence(printable(self.text))):
            lines.insert(0, Text.assemble(("answer ", "dim"), (answer, "bold green")))
        return [Text(), *lines]


class LiveCanvas:
    """Draws a canvas into a terminal while its stream runs; a context manager.

    The cursor is hidden in between and always shown again on exit. A stream that breaks before its
    first block leaves nothing behind.

    Args:
        question: the prompt, shown above the answer.
        console: where to draw.
        frame_s: drafts that come within so many seconds of a drawing are not drawn by themselves.
    """

    def __init__(self, question: str, *, console: Console, frame_s: float = FRAME_S) -> None:
        self._canvas = Canvas(question)
        self._live = Live(
            self._canvas,
            console=console,
            auto_refresh=False,
            vertical_overflow="crop",
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._frame_s = frame_s
        self._drawn_at = 0.0

    def apply(self, event: Event) -> None:
        """Take in the next event and draw it; drafts at most once per frame."""
        self._canvas.apply(event)
        now = time.monotonic()
        if not isinstance(event, Draft) or now - self._drawn_at >= self._frame_s:
            self._live.refresh()
            self._drawn_at = now

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._canvas.close()
        self._live.transient = isinstance(error, Exception) and not self._canvas.text
        self._live.stop()


_REASONS: Final = {
    "length": "cut off: max_new_tokens is reached",
    "stop": "ended by a stop string",
    "cancelled": "cancelled",
}


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
