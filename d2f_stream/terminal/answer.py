"""Answer: one answer on the console, Markdown as it comes."""

import time

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

from d2f_stream.core.events import Block, Draft, Event, StreamFailed, StreamFinished, StreamStarted
from d2f_stream.terminal.canvas import FRAME_S, Drafts
from d2f_stream.terminal.markdown_stream import MarkdownStream
from d2f_stream.terminal.views import about_silence, printable

__all__ = ["Answer"]


class Answer:
    """One answer on the console: settled Markdown above, what may still change below it.

    Args:
        console: what is drawn on.
        description: of the model, for an answer without a word.
        canvas: draw the blocks that are being filled in, as their drafts come, behind the text.
    """

    def __init__(self, console: Console, description: str = "", *, canvas: bool = False) -> None:
        self._console = console
        self._description = description
        self._markdown = MarkdownStream()
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._is_empty = True
        self._drafts = Drafts() if canvas else None
        self._drawn_at = 0.0
        self.failure: StreamFailed | None = None

    def __enter__(self) -> None:
        self._live.start()

    def __exit__(self, *_: object) -> None:
        self._settle()

    def apply(self, event: Event) -> None:
        """Draw an event of the stream; drafts at most once per frame."""
        if self._drafts is not None:
            self._drafts.apply(event)
        match event:
            case Draft() if self._drafts is not None:
                if time.monotonic() - self._drawn_at >= FRAME_S:
                    self._live.update(self._draw_canvas(self._drafts), refresh=True)
                    self._drawn_at = time.monotonic()
            case StreamStarted():
                self._live.update(Text("...", style="dim"), refresh=True)
            case Block():
                self._is_empty = self._is_empty and not event.text.strip()
                if settled := self._markdown.append(printable(event.text)):
                    self._live.console.print(Markdown(settled))
                drafts = self._drafts
                drawn = self._draw_tail() if drafts is None else self._draw_canvas(drafts)
                self._live.update(drawn, refresh=True)
            case StreamFinished():
                self._settle()
                self._console.print(Text(self._figures(event), style="dim"))
            case StreamFailed():
                self.failure = event
            case _:
                pass

    def _draw_tail(self) -> Markdown | Text:
        """Return what may still change; of what is higher than the terminal, the end."""
        tail, room = self._markdown.tail, self._console.height - 2
        lines = tail.splitlines()
        return Markdown(tail) if len(lines) <= room else Text("\n".join(lines[-room:]))

    def _draw_canvas(self, drafts: Drafts) -> Text:
        """Return what may still change as it stands, and the blocks behind it: their end."""
        text, room = Text(self._markdown.tail), max(self._console.height - 2, 1)
        drafts.append_to(text, ascii_only=self._console.options.ascii_only)
        return Text("\n").join(text.wrap(self._console, self._console.width)[-room:])

    def _settle(self) -> None:
        """Draw the rest for good. Idempotent."""
        if self._live.is_started:
            self._live.update(Text())  # or masks would be drawn once more
            self._live.stop()
        if rest := self._markdown.finish():
            self._console.print(Markdown(rest))

    def _figures(self, event: StreamFinished) -> str:
        usage, seconds = event.usage, max(event.timings.total_ms / 1000, 1e-3)
        tokens = "1 token" if usage.completion_tokens == 1 else f"{usage.completion_tokens} tokens"
        told = f"{tokens}, {usage.tokens_per_step:.1f} a step"
        told += f", {usage.completion_tokens / seconds:,.0f} a second"
        if event.reason == "length":
            told += "; cut off at max_new_tokens"
        elif event.reason == "cancelled":
            told += "; stopped"
        if self._is_empty and (silence := about_silence(event.reason, self._description)):
            told = f"{silence}\n{told}"
        return told
