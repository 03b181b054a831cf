"""Text files that go with a question."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from browser.chromium import Page, expect
from browser.conftest import OpenPage
from browser.page_server import ScriptedServer
from browser.reader import ask, expect_idle, used_tokens

pytestmark = pytest.mark.browser

PASTE = """(field, name) => {
    const clipboardData = new DataTransfer();
    clipboardData.items.add(new File(["pasted"], name));
    field.dispatchEvent(new ClipboardEvent("paste", { clipboardData, cancelable: true }));
}"""
DROP = """(name) => {
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File(["dropped"], name));
    const event = { dataTransfer, cancelable: true, bubbles: true };
    document.body.dispatchEvent(new DragEvent("drop", event));
}"""

HOLD_FILES = """() => {
    const read = File.prototype.arrayBuffer;
    const held = new Promise((resolve) => { window.letFilesThrough = resolve; });
    File.prototype.arrayBuffer = async function () { await held; return read.call(this); };
}"""
DROP_LARGE = """() => {
    for (const name of ["first.txt", "second.txt"]) {
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File(["x".repeat(60_000)], name));
        const event = { dataTransfer, cancelable: true, bubbles: true };
        document.body.dispatchEvent(new DragEvent("drop", event));
    }
}"""


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(is_held=False) as server:
        yield server


def attach(page: Page, *paths: Path) -> None:
    page.get_by_label("Text files for the question").set_input_files(list(paths))


def names(page: Page) -> list[str]:
    return page.locator(".attachment .name").all_text_contents()


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_files_go_behind_the_question_each_in_a_fence_of_its_own(
    server: ScriptedServer, open_page: OpenPage, tmp_path: Path
) -> None:
    page = open_page(server)
    before = used_tokens(page)
    code = written(tmp_path, "sum.py", "print(1 + 1)\n")
    fenced = written(tmp_path, "notes.md", "```\nin a fence\n```\n")
    attach(page, code, fenced)
    expect(page.locator(".attachment")).to_have_count(2)
    assert used_tokens(page) > before
    ask(page, "What does this do?")
    expect_idle(page)
    [prompt] = server.prompts
    assert prompt == (
        "user: What does this do?\n\nsum.py:\n```py\nprint(1 + 1)\n```\n\n"
        "notes.md:\n````md\n```\nin a fence\n```\n````\nassistant: "
    )
    assert names(page) == []
    expect(page.get_by_role("button", name="What does this do?").first).to_be_attached()


def test_licences_of_the_libraries_are_linked_and_served(
    server: ScriptedServer, open_page: OpenPage
) -> None:
    page = open_page(server)
    page.get_by_role("button", name="Settings").click()
    address = page.get_by_role("link", name="Licences").get_attribute("href")
    found = page.request.get(f"{server.url}{address}")
    assert found.headers["content-type"] == "text/plain; charset=utf-8"
    assert "==== dompurify " in found.text()


def test_files_can_be_taken_away_pasted_and_dropped(
    server: ScriptedServer, open_page: OpenPage, tmp_path: Path
) -> None:
    page = open_page(server)
    attach(page, written(tmp_path, "a.txt", "a"))
    page.get_by_role("button", name="Remove a.txt").click()
    expect(page.locator("#attachments")).to_be_hidden()
    page.get_by_label("Your question").evaluate(PASTE, "pasted.txt")
    page.evaluate(DROP, "dropped.txt")
    expect(page.locator(".attachment")).to_have_count(2)
    assert sorted(names(page)) == ["dropped.txt", "pasted.txt"]


def test_what_is_not_taken_is_told_by_name_and_limit(
    server: ScriptedServer, open_page: OpenPage, tmp_path: Path
) -> None:
    page = open_page(server)
    toast = page.locator("#toast-text")
    attach(page, written(tmp_path, "picture.png", b"\x89PNG\xff"))
    expect(toast).to_have_text("picture.png is left out: it is not text in UTF-8.")
    attach(page, written(tmp_path, "zeros.bin", b"a\0b"))
    expect(toast).to_have_text("zeros.bin is left out: it is not text.")
    attach(page, written(tmp_path, "long.txt", "x" * 100_001))
    expect(toast).to_contain_text(
        "long.txt is left out: it has 100,001, and the files of a question"
    )
    attach(page, written(tmp_path, "huge.log", "x" * 400_001))
    expect(toast).to_contain_text(
        "huge.log is left out: the files of a question have at most 100,000"
    )
    assert names(page) == []
    attach(page, *(written(tmp_path, f"{number}.txt", "x") for number in range(9)))
    expect(toast).to_have_text("8.txt is left out: a question takes at most 8 files.")
    assert len(names(page)) == 8


@pytest.mark.parametrize(
    ("content", "fence"),
    [("  ```\nindented\n  ```\n", "````"), ("a ````` b\n", "``````"), ("`one`\n", "```")],
)
def test_fence_is_longer_than_any_run_of_backticks(
    server: ScriptedServer, open_page: OpenPage, tmp_path: Path, content: str, fence: str
) -> None:
    page = open_page(server)
    attach(page, written(tmp_path, "a.md", content))
    expect(page.locator(".attachment")).to_have_count(1)
    ask(page, "What?")
    expect_idle(page)
    [prompt] = server.prompts
    assert prompt == f"user: What?\n\na.md:\n{fence}md\n{content}{fence}\nassistant: "


def test_files_fit_in_a_message_as_bytes(
    server: ScriptedServer, open_page: OpenPage, tmp_path: Path
) -> None:
    page = open_page(server)
    attach(page, written(tmp_path, "long.txt", "\u6f22" * 90_000))
    expect(page.locator("#toast-text")).to_have_text(
        "long.txt is left out: it takes 270,002 bytes, and the files of a question take at most "
        "200,000 together."
    )
    attach(page, written(tmp_path, "short.txt", "\u6f22" * 60_000))
    expect(page.locator(".attachment")).to_have_count(1)


def test_files_dropped_at_once_share_the_room(server: ScriptedServer, open_page: OpenPage) -> None:
    page = open_page(server)
    page.evaluate(DROP_LARGE)
    expect(page.locator("#toast-text")).to_contain_text("second.txt is left out: it has 60,000")
    assert names(page) == ["first.txt"]


def test_question_waits_for_a_file_that_is_being_read(
    server: ScriptedServer, open_page: OpenPage
) -> None:
    page = open_page(server)
    page.evaluate(HOLD_FILES)
    page.evaluate(DROP, "dropped.txt")
    field = page.get_by_label("Your question")
    field.fill("What?")
    field.press("Enter")
    field.press("Enter")
    assert field.input_value() == "What?"
    page.evaluate("() => window.letFilesThrough()")
    expect(page.locator(".answer")).to_have_count(1)
    expect_idle(page)
    [prompt] = server.prompts
    assert prompt == "user: What?\n\ndropped.txt:\n```txt\ndropped\n```\nassistant: "
    assert names(page) == []
