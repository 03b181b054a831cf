"""The pages name files that exist, and the site holds them all."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from d2f_stream.terminal.arguments import ELSEWHERE, build_parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = re.compile(r"`((?:d2f_stream|runtime|export|lab|tests|bench|scripts|docs)/[\w./-]+)`")
LINKS = re.compile(r"\]\(((?!https?://|#)[^)#\s]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_names_files_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = [ROOT / match for match in SOURCES.findall(text) if "..." not in match]
    linked = [page.parent / match for match in LINKS.findall(text)]
    assert [str(path) for path in named + linked if not path.exists()] == []


def test_every_page_is_in_the_site_s_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    named = re.findall(r": ([\w/-]+\.md)$", nav, re.MULTILINE)
    pages = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(named) == sorted(pages)


def test_reference_of_commands_is_made_from_their_parsers(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "docs_pages.py"
    subprocess.run([sys.executable, str(script), str(tmp_path / "pages")], check=True, timeout=60)
    text = (tmp_path / "pages" / "reference" / "commands.md").read_text(encoding="utf-8")
    parser = build_parser()
    (commands,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for name in commands.choices.keys() - ELSEWHERE.keys():
        section = text.partition(f"## d2f-stream {name}\n")[2].partition("\n## ")[0]
        options = [flag for a in commands.choices[name]._actions for flag in a.option_strings]
        assert [flag for flag in options if f"`{flag}`" not in section] in ([], ["-h", "--help"])
    for name in ELSEWHERE.keys() - {"eval"}:  # whose options are lm-eval's
        assert f"## d2f-stream {name}\n" in text
    assert "| `--lora-rank` `N` | `32` | of the LoRA's factors |" in text
    assert "| `--quantize` `NAME` |" in text
    outside = re.compile(r"\]\(\.\./\.\./")
    pages = (tmp_path / "pages").glob("*.md")
    assert [page for page in pages if outside.search(page.read_text("utf-8"))] == []
