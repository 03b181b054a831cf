"""Every state of the page, one after the other, on one page over one server."""

from collections.abc import Callable, Iterator
from pathlib import Path

from browser.chromium import Page, expect
from browser.conftest import offline
from browser.page_server import ScriptedServer
from browser.reader import STEPS_A_BLOCK, answer, ask, expect_idle

MARKDOWN = """With **bold** and `code` and [a link](https://example.org) and $x^2$.

# Heading

```python
def f(x):  # a comment that is longer than the column is wide, and goes on to the right of it all
    return "text", 1, None
```

| Name | Kind | Since | Price | Rate | Note |
|---|---|--:|--:|--:|---|
| Internationalisation | word | 1969 | 1,234.50 | 12 % | long |

> quoted

1. one, and https://example.org/an/address/that/is/longer/than/any/telephone/is/wide?and=more
2. two

$$\\sum_{i=0}^{n} i$$
"""
THOUGHT = "<think>\nLet me see: what a rather long-winded thought this is.\n</think>\n\nIt is two."
LONG_WORD = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft"
ONLY_WIDE = ("renamed",)  # a list of chats that goes ends what is written there
BEFORE_CODE = 25  # steps until the canvas stands in the code


def said(prompt: str) -> str:
    """What the model answers to the last question of a prompt."""
    asked = prompt.rpartition("user: ")[2]
    if "think" in asked:
        return THOUGHT
    return "" if "nothing" in asked else MARKDOWN


def tour_server() -> ScriptedServer:
    description = "Answers questions; small enough for any computer."
    about = {"max_len": 900, "description": description, "license": "apache-2.0"}
    return ScriptedServer(said, about=about, max_new_tokens=700)


def tour(page: Page, server: ScriptedServer) -> Iterator[str]:
    """Bring the page of `tour_server` into each state, and yield its name there."""
    states: list[Callable[[Page, ScriptedServer], Iterator[str]]] = [
        *(_welcome, _first_answer, _other_answers, _failures, _chats, _settings, _connection),
    ]
    for states_of in states:
        yield from states_of(page, server)


def _welcome(page: Page, server: ScriptedServer) -> Iterator[str]:
    del server
    expect(page.locator("#examples")).to_be_visible()
    expect_idle(page)
    yield "welcome"


def _first_answer(page: Page, server: ScriptedServer) -> Iterator[str]:
    ask(page)
    expect(page.locator("#conversation .mask").first).to_be_visible()
    yield "waiting"
    server.gate.let_through(BEFORE_CODE)
    expect(page.locator(".code .canvas")).to_be_attached()
    yield "answering"
    page.get_by_role("button", name="Stop").click()
    while not page.locator(".note").is_visible():
        server.gate.let_through(1)
    expect_idle(page)
    yield "stopped"
    server.gate.open()
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".place")).to_contain_text("2 / 2")
    expect(page.locator(".prose math[display=block]")).to_be_attached()
    expect_idle(page)
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    yield "answer"
    page.get_by_role("button", name="Edit the question").click()
    yield "edited"
    page.get_by_role("button", name="Cancel").click()


def _other_answers(page: Page, server: ScriptedServer) -> Iterator[str]:
    del server
    ask(page, f"Do think about {LONG_WORD}. " * 5)
    expect(page.locator(".left-out")).to_be_visible()
    expect(page.locator(".thought summary")).to_contain_text("Thoughts")
    expect_idle(page)
    yield "full, folded thought"
    page.locator(".thought summary").click()
    yield "open thought"
    page.get_by_role("button", name="New chat").click()
    ask(page, "Say nothing.")
    expect(page.locator(".answer .note")).to_contain_text("without a word")
    expect_idle(page)
    yield "no word"
    page.get_by_label("Text files for the question").set_input_files(
        [Path(__file__), Path(__file__).with_name("conftest.py")]
    )
    expect(page.locator(".attachment")).to_have_count(2)
    page.get_by_label("Your question").fill("What is in these?\nTwo lines.")
    yield "attachments"


def _failures(page: Page, server: ScriptedServer) -> Iterator[str]:
    del server
    for _ in range(2):
        page.get_by_role("button", name="Remove ").first.press("Enter")
    ask(page, "why " * 1200)
    expect(page.get_by_role("alert")).to_be_visible()
    expect_idle(page)
    expect(page.get_by_role("button", name="To the end")).to_be_hidden()  # the field has shrunk
    yield "error"


def _chats(page: Page, server: ScriptedServer) -> Iterator[str]:
    del server
    page.get_by_role("button", name="Delete: ").first.focus()
    yield "tools of a chat"
    page.get_by_role("button", name="Rename: ").first.press("Enter")
    yield "renamed"
    page.get_by_label("Name of the chat").fill(f"{LONG_WORD}, and what else has a long name")
    page.keyboard.press("Enter")
    page.get_by_label("File with chats").set_input_files(__file__)
    expect(page.locator("#toast")).to_be_visible()
    yield "toast"
    page.get_by_label("Search the chats").fill("zebra")
    expect(page.get_by_text("No chat has these words.")).to_be_visible()
    yield "nothing found"
    page.get_by_label("Search the chats").fill("")
    page.get_by_role("button", name=f"Delete: {LONG_WORD}").press("Enter")
    expect(page.get_by_role("button", name="Undo")).to_be_visible()
    yield "deleted"


def _settings(page: Page, server: ScriptedServer) -> Iterator[str]:
    del server
    page.get_by_role("button", name="Settings").click()
    yield "settings"
    page.get_by_label("Block size").fill("900")
    page.get_by_label("Longest answer").fill("")
    yield "wrong settings"
    page.keyboard.press("Escape")


def _connection(page: Page, server: ScriptedServer) -> Iterator[str]:
    with offline(page, server):
        expect(page.locator("#banner")).to_be_visible()
        yield "offline"
        server.stop()
        server.start()
    expect(page.locator("#banner")).to_be_hidden()
    ask(page)
    server.gate.let_through(3 * STEPS_A_BLOCK)
    page.wait_for_function("() => document.querySelector('.turn:last-child .prose').textContent")
    with offline(page, server):
        server.stop()
        server.start()
    expect(page.get_by_role("alert")).to_contain_text("no longer knows this answer")
    assert answer(page)
    yield "restarted"


def drawer_tour(page: Page) -> Iterator[str]:
    """Bring a narrow page into the states of its list of chats."""
    page.get_by_role("button", name="Chats", exact=True).click()
    expect(page.get_by_label("Search the chats")).to_be_focused()
    yield "drawer"
    page.get_by_role("button", name="Rename: ").first.press("Enter")
    yield "drawer, renamed"
    page.keyboard.press("Escape")
    page.get_by_label("Search the chats").fill("zebra")
    expect(page.get_by_text("No chat has these words.")).to_be_visible()
    yield "drawer, nothing found"
