"""Answer: one answer on the console, Markdown as it comes."""

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

from d2f_stream.core.events import Block, StreamFailed, StreamFinished, StreamStarted
from d2f_stream.terminal.markdown_stream import MarkdownStream
from d2f_stream.terminal.views import about_silence, printable

__all__ = ["Answer"]


class Answer:
    """One answer on the console: settled Markdown above, what may still change below it."""

    def __init__(self, console: Console, description: str = "") -> None:
        self._console = console
        self._description = description
        self._markdown = MarkdownStream()
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._is_empty = True
        self.failure: StreamFailed | None = None

    def __enter__(self) -> None:
        self._live.start()

    def __exit__(self, *_: object) -> None:
        self._settle()

    def apply(self, event: object) -> None:
        """Draw an event of the stream."""
        match event:
            case StreamStarted():
                self._live.update(Text("...", style="dim"), refresh=True)
            case Block():
                self._is_empty = self._is_empty and not event.text.strip()
                if settled := self._markdown.append(printable(event.text)):
                    self._live.console.print(Markdown(settled))
                self._live.update(self._draw_tail(), refresh=True)
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

    def _settle(self) -> None:
        """Draw the rest for good. Idempotent."""
        if self._live.is_started:
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
