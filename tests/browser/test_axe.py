"""axe finds nothing wrong with any state of the page, at any width, in any theme."""

from typing import Literal

import pytest

from browser.axe import LOOK_RULES, faults
from browser.chromium import Page, ViewportSize, expect
from browser.conftest import OpenPage
from browser.page_server import ScriptedServer
from browser.tour import ONLY_WIDE, drawer_tour, tour, tour_server
from d2f_stream.server.auth import Auth

pytestmark = pytest.mark.browser

WIDE: ViewportSize = {"width": 1280, "height": 800}
NARROW: list[ViewportSize] = [{"width": 390, "height": 844}, {"width": 320, "height": 640}]
THEMES: tuple[Literal["light", "dark"], ...] = ("dark", "light")


def faults_of_other_looks(page: Page, sizes: list[ViewportSize]) -> list[str]:
    """Return what is wrong at each size in each theme; the page is light then, of the last size.

    So it was before, and all rules were tried on it.
    """
    found: list[str] = []
    for size in sizes:
        page.set_viewport_size(size)
        for theme in THEMES:
            page.emulate_media(color_scheme=theme)
            if (size, theme) != (sizes[-1], THEMES[-1]):
                found += [f"{size}, {theme}: {fault}" for fault in faults(page, LOOK_RULES)]
        if page.evaluate("document.documentElement.scrollWidth") > size["width"]:
            found.append(f"{size}: the page scrolls sideways")
    return found


def test_axe_finds_no_fault_in_any_state(open_page: OpenPage) -> None:
    with tour_server() as server:
        page = open_page(server, reduced_motion="reduce", viewport=WIDE)
        found = {}
        for state in tour(page, server):
            sizes = [] if state in ONLY_WIDE else NARROW
            found[state] = [*faults(page), *faults_of_other_looks(page, [*sizes, WIDE])]
        page.set_viewport_size(NARROW[-1])
        for state in drawer_tour(page):
            found[state] = [*faults(page), *faults_of_other_looks(page, NARROW[-1:])]
        assert {state: faults for state, faults in found.items() if faults} == {}


def test_axe_finds_no_fault_where_a_token_is_asked(open_page: OpenPage) -> None:
    with ScriptedServer(auth=Auth({"me": "0123456789abcdef0123"})) as server:
        page = open_page(server, reduced_motion="reduce", viewport=WIDE)
        expect(page.get_by_role("dialog")).to_be_visible()
        assert faults(page) == []
        assert faults_of_other_looks(page, [*NARROW, WIDE]) == []
        page.get_by_role("button", name="Not now").click()
        expect(page.get_by_text("This server asks for a token.")).to_be_visible()
        assert faults(page) == []
        assert faults_of_other_looks(page, [*NARROW, WIDE]) == []
