"""Writes the pages that the site is built of: docs/, with tables made from the code, into a folder.

    python scripts/docs_pages.py FOLDER

The pages are written for whoever reads them in the repository too, where a link may lead to any
file. On the site, what is not part of it is an address of the repository's.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from d2f_export.distill.command import build_parser as distill_parser
from d2f_export.distill.from_ar.command import train_parser, write_parser
from d2f_export.onnx.command import export_parser, verify_parser
from d2f_stream.terminal.arguments import ELSEWHERE, build_parser

ROOT: Final = Path(__file__).resolve().parent.parent
DOCS: Final = ROOT / "docs"
REPOSITORY: Final = "https://github.com/d2f-stream/d2f-stream/blob/main/"
LINK: Final = re.compile(r"\]\((\.\./[^)#\s]+)")
COMMANDS: Final = "<!-- commands -->"
SETTING: Final = re.compile(r"(.*?) ?\((\(.*\)|[^()]*)\)")
"""The help of a setting that may stand in a file instead: its default ends it."""


def main(folder: Path) -> None:
    """Write all pages and their pictures; what was there before is gone."""
    shutil.rmtree(folder, ignore_errors=True)
    for path in sorted(DOCS.rglob("*")):
        target = folder / path.relative_to(DOCS)
        if path.is_dir():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            target.write_text(_page(path), encoding="utf-8")
        else:
            shutil.copyfile(path, target)


def _page(path: Path) -> str:
    def outside(match: re.Match[str]) -> str:
        target = (path.parent / match[1]).resolve()
        if target.is_relative_to(DOCS):
            return match[0]
        return f"]({REPOSITORY}{target.relative_to(ROOT)}"

    text = LINK.sub(outside, path.read_text(encoding="utf-8"))
    return text.replace(COMMANDS, "\n".join(_commands())) if COMMANDS in text else text


def _commands() -> Iterator[str]:
    parser = build_parser()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                if name not in ELSEWHERE:
                    yield from _command(f"d2f-stream {name}", command)
    for offline in (
        *(distill_parser("d2f-stream distill"), train_parser(), write_parser()),
        *(export_parser(), verify_parser()),
    ):
        yield from _command(offline.prog, offline)


def _command(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield from (f"## {name}", "", (parser.description or "").strip(), "")
    nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for group in parser._action_groups:
        rows = [_row(action) for action in group._group_actions if action not in nested]
        rows = [row for row in rows if row]
        if rows:
            title = group.title or ""
            if title not in ("options", "positional arguments"):
                yield from (f"**{title}**", "")
            yield from ("| option | default | what it does |", "|---|---|---|", *rows, "")
    for action in nested:
        for inner, command in action.choices.items():
            yield from _command(f"{name} {inner}", command)


def _row(action: argparse.Action) -> str:
    if action.help is argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
        return ""
    told = re.sub(r" ?\((default: )?%\(default\)s\)", "", action.help or "")
    default = "" if action.default in (None, False, [], argparse.SUPPRESS) else action.default
    if action.default == argparse.SUPPRESS and (ending := SETTING.fullmatch(told)):
        told, default = ending[1], ending[2]
    flags = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.dest}`"
    if action.nargs != 0 and action.option_strings:
        value = action.metavar or (action.choices and f"{{{','.join(map(str, action.choices))}}}")
        flags += f" `{value or action.dest.upper()}`"
    cells = (flags, f"`{default}`" if default != "" else "", told % {"default": action.default})
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
