"""What everybody must be able to use: themes, motion, small screens, assistive technology."""

from collections.abc import Iterator

import pytest

from browser.chromium import Page, expect
from browser.conftest import OpenPage
from browser.page_server import ScriptedServer
from browser.reader import STEPS_A_BLOCK, ask, expect_idle

pytestmark = pytest.mark.browser

BRIGHT = 3 * 128
PHONE = {"width": 320, "height": 640}


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
    for choice in page.get_by_role("dialog").get_by_role("group").all():
        expect(choice).to_have_css("background-image", "none")  # no shades of what scrolls
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


def test_remark_about_the_temperature_covers_no_button(open_page: OpenPage) -> None:
    with ScriptedServer("A line.\n\n" * 12) as server:
        server.gate.open()
        page = open_page(server, viewport=PHONE)
        ask(page)
        expect_idle(page)
        page.get_by_role("button", name="Regenerate").click()
        remark = page.get_by_text("At temperature 0 the same answer comes again.")
        expect(remark).to_be_visible()
        expect_idle(page)
        expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
        covered = page.evaluate(
            "[...document.querySelectorAll('.turn:last-child .answer button')]"
            ".filter((one) => one.getClientRects().length).filter((one) => {"
            "  const { x, y, width, height } = one.getBoundingClientRect();"
            "  return !one.contains(document.elementFromPoint(x + width / 2, y + height / 2));"
            "}).map((one) => one.textContent.trim())"
        )
        assert covered == []
        remark.get_by_role("button").click()
        expect(page.locator("#settings")).to_be_visible()
        page.keyboard.press("Escape")
        ask(page, "And now?")
        expect(remark).to_be_hidden()


def test_fingers_find_every_control(server: ScriptedServer, open_page: OpenPage) -> None:
    page = open_page(server, viewport=PHONE, has_touch=True, is_mobile=True)
    expect_idle(page)
    sizes = page.evaluate(
        "[...document.querySelectorAll('button, .segments label, .switch')]"
        ".map((one) => one.getBoundingClientRect()).filter(({ width }) => width > 0)"
        ".map(({ width, height }) => Math.min(width, height))"
    )
    assert min(sizes) >= 32
