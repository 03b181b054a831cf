"""What everybody must be able to use: themes, motion, small screens, assistive technology."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from browser.chromium import Axe, Page, expect
from browser.conftest import OpenPage
from browser.page_server import ScriptedServer
from browser.reader import STEPS_A_BLOCK, ask, expect_idle
from d2f_stream.server.auth import Auth

pytestmark = pytest.mark.browser

BRIGHT = 3 * 128
PHONE = {"width": 320, "height": 640}
DESKTOP = {"width": 1280, "height": 800}

TOUR = """With **bold** and `code` and [a link](https://example.org) and $x^2$.

# Heading

```python
def f(x):  # a comment
    return "text", 1, None
```

| A | B | C | D | E | F |
|---|---|---|---|---|---|
| 1 | 2 | 3 | 4 | 5 | 6 |

> quoted

1. one
2. two

$$\\sum_{i=0}^{n} i$$
"""


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


def background(page: Page) -> int:
    """How bright the page is: the sum of its background's red, green and blue."""
    parts = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g)")
    return sum(map(int, parts[:3]))


def test_theme_follows_the_system_until_it_is_chosen(
    server: ScriptedServer, open_page: OpenPage
) -> None:
    page = open_page(server, color_scheme="dark")
    assert background(page) < BRIGHT
    page.emulate_media(color_scheme="light")
    assert background(page) > BRIGHT
    page.get_by_role("button", name="Switch to dark").click()
    assert background(page) < BRIGHT
    page.reload()
    assert background(page) < BRIGHT
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_role("radio", name="Dark")).to_be_checked()
    page.get_by_role("radio", name="System").check()
    assert background(page) > BRIGHT


def test_reduced_motion_moves_nothing_and_waits_for_nothing(
    server: ScriptedServer, open_page: OpenPage
) -> None:
    page = open_page(server, reduced_motion="reduce")
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_role("radio", name="Live")).to_be_checked()
    page.keyboard.press("Escape")
    ask(page)
    server.gate.let_through(STEPS_A_BLOCK + 1)
    expect(page.locator("#conversation .token").first).to_be_visible()
    moves = "document.getAnimations().length"
    assert page.evaluate(moves) == 0
    durations = page.evaluate(
        "[...document.querySelectorAll('*')].map((one) => getComputedStyle(one))"
        ".flatMap((style) => [style.transitionDuration, style.animationName])"
    )
    assert set(durations) == {"0s", "none"}
    server.gate.open()
    expect_idle(page)
    assert page.evaluate(moves) == 0


def test_each_finished_part_is_announced_once_and_drafts_never(open_page: OpenPage) -> None:
    with ScriptedServer("# One\n\nTwo *and* more.\n\n- three\n") as server:
        page = open_page(server, pace="slow")
        log = page.get_by_role("log")
        assert log.get_attribute("aria-live") == "polite"
        ask(page)
        server.gate.let_through(STEPS_A_BLOCK)
        expect(log.locator("p")).to_have_text(["One"])
        server.sever()
        server.gate.open()
        expect(log.locator("p")).to_have_text(["One", "Two and more.", "three"])
        assert page.evaluate("document.querySelectorAll('#conversation [aria-live]').length") == 0


def test_phone_never_scrolls_sideways(server: ScriptedServer, open_page: OpenPage) -> None:
    page = open_page(server, viewport=PHONE, has_touch=True, is_mobile=True)

    def check() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]

    check()
    ask(page, "a-question-without-any-spaces-in-it" * 8)
    server.gate.let_through(STEPS_A_BLOCK + 1)
    expect(page.locator("#conversation .token").first).to_be_visible()
    check()
    server.gate.open()
    expect_idle(page)
    check()
    ask(page, "why " * 1200)
    expect(page.get_by_role("alert")).to_be_visible()
    check()
    page.get_by_role("button", name="Chats", exact=True).click()
    expect(page.get_by_label("Search the chats")).to_be_focused()
    assert page.evaluate("document.getElementById('dock').inert")
    check()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Chats", exact=True)).to_be_focused()
    page.get_by_role("button", name="Settings").click()
    sheet = page.locator("#settings")
    assert sheet.evaluate("(sheet) => sheet.scrollWidth <= sheet.clientWidth")


def test_fingers_find_every_control(server: ScriptedServer, open_page: OpenPage) -> None:
    page = open_page(server, viewport=PHONE, has_touch=True, is_mobile=True)
    expect_idle(page)
    sizes = page.evaluate(
        "[...document.querySelectorAll('button, .segments label, .switch')]"
        ".map((one) => one.getBoundingClientRect()).filter(({ width }) => width > 0)"
        ".map(({ width, height }) => Math.min(width, height))"
    )
    assert min(sizes) >= 32


LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", "viewport": DESKTOP},
    "dark": {"color_scheme": "dark", "viewport": DESKTOP},
    "phone": {"color_scheme": "light", "viewport": PHONE},
}
RULES: dict[str, dict[str, Any]] = {
    "light": {},
    "dark": {"runOnly": ["color-contrast"]},  # all else is as in light
    "phone": {},
}

SKIPPED = {  # what looks there as it does in light
    "light": (),
    "dark": ("edited", "renamed"),
    "phone": ("in_progress", "edited", "renamed", "told"),
}


def faults(page: Page, look: str) -> list[str]:
    options = {"resultTypes": ["violations"], **RULES[look]}
    found = Axe().run(page, options=options).response["violations"]
    return [
        f"{fault['id']}: {node['html']} {node['failureSummary']}"
        for fault in found
        for node in fault["nodes"]
    ]


@pytest.mark.parametrize("look", LOOKS)
def test_axe_finds_no_fault_in_any_state(open_page: OpenPage, look: str) -> None:
    with ScriptedServer(TOUR, about={"max_len": 700}, max_new_tokens=800) as server:
        page = open_page(server, reduced_motion="reduce", **LOOKS[look])

        def in_progress() -> None:
            ask(page)
            server.gate.let_through(25)
            expect(page.locator(".code .canvas")).to_be_attached()

        def finished() -> None:
            server.gate.open()
            expect_idle(page)

        def edited() -> None:
            page.get_by_role("button", name="Edit the question").click()

        def full() -> None:
            page.get_by_role("button", name="Cancel").click()
            ask(page, "And again?" * 30)
            expect(page.locator(".left-out")).to_be_visible()
            expect_idle(page)

        def attached() -> None:
            page.get_by_label("Text files for the question").set_input_files(__file__)
            expect(page.locator(".attachment")).to_be_visible()

        def failed() -> None:
            page.get_by_role("button", name="Remove ").click()
            ask(page, "why " * 1200)
            expect(page.get_by_role("alert")).to_be_visible()

        def listed() -> None:
            if page.locator("#chats").is_hidden():
                page.get_by_role("button", name="Chats", exact=True).click()
            page.get_by_role("button", name="Delete: ").first.focus()

        def renamed() -> None:
            page.get_by_role("button", name="Rename: ").first.click(force=True)

        def told() -> None:
            page.keyboard.press("Escape")
            page.get_by_label("File with chats").set_input_files(__file__)
            expect(page.locator("#toast")).to_be_visible()

        def configured() -> None:
            page.keyboard.press("Escape")
            page.get_by_role("button", name="Settings").click()
            page.get_by_label("Block size").fill("900")

        states: list[Callable[[], None]] = [
            *(lambda: expect_idle(page), in_progress, finished, edited, full, attached),
            *(failed, listed, renamed, told, configured),
        ]
        for enter in states:
            enter()
            if enter.__name__ not in SKIPPED[look]:
                assert faults(page, look) == []


def test_axe_finds_no_fault_where_a_token_is_asked(open_page: OpenPage) -> None:
    with ScriptedServer(auth=Auth({"me": "0123456789abcdef0123"})) as server:
        page = open_page(server, reduced_motion="reduce", **LOOKS["phone"])
        expect(page.get_by_role("dialog")).to_be_visible()
        assert faults(page, "phone") == []
        page.get_by_role("button", name="Not now").click()
        expect(page.get_by_text("This server asks for a token.")).to_be_visible()
        assert faults(page, "phone") == []
