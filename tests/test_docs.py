"""The pages name files that exist, and the site holds them all."""

import re
from pathlib import Path

import pytest

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
