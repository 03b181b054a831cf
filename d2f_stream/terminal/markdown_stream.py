"""MarkdownStream: which part of a growing Markdown text can no longer change its look. Pure.

A paragraph may still become a heading, a line a table, a fence may still be open: only what stands
before the last top-level block is settled. CommonMark's blocks are told by markdown-it-py.
"""

from markdown_it import MarkdownIt

__all__ = ["MarkdownStream"]


class MarkdownStream:
    """Takes a text piece by piece, and gives its top-level blocks out as they settle."""

    def __init__(self) -> None:
        self._parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
        self._tail = ""

    @property
    def tail(self) -> str:
        """What is not settled yet."""
        return self._tail

    def append(self, text: str) -> str:
        """Add text; return the Markdown that has settled with it, whole blocks, maybe none."""
        self._tail += text
        starts = [
            token.map[0]
            for token in self._parser.parse(self._tail)
            if token.level == 0 and token.map is not None and token.nesting >= 0
        ]
        if len(starts) < 2:
            return ""
        lines = self._tail.splitlines(keepends=True)
        settled = "".join(lines[: starts[-1]])
        self._tail = self._tail[len(settled) :]
        return settled

    def finish(self) -> str:
        """Return the rest: nothing follows."""
        rest, self._tail = self._tail, ""
        return rest
