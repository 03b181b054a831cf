"""A real Chromium, and pages that are watched: for foreign requests, errors and broken policies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import pytest

from browser.page_server import PageServer, ScriptedServer
from requirements import require_program

if TYPE_CHECKING:  # this file is read even where Playwright is missing
    from browser.chromium import (
        Browser,
        BrowserContext,
        ConsoleMessage,
        Page,
        Request,
        ViewportSize,
        WebSocket,
    )

# A page that is cut off says so, whatever its script does about it.
EXPECTED_ERRORS = ("WebSocket connection to", "net::ERR_")

MEDIA = ("color_scheme", "reduced_motion")  # what is set for a page, not for its profile
DESKTOP: ViewportSize = {"width": 1280, "height": 720}


class OpenPage(Protocol):
    def __call__(
        self,
        server: PageServer,
        *,
        pace: str = "live",
        script: str = "",
        is_apart: bool = False,
        **options: Any,
    ) -> Page: ...


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    # Not for the whole session: while Playwright is open, no other event loop runs on this thread.
    from browser.chromium import sync_playwright

    path = require_program("chromium")
    arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def profile(chromium: Browser) -> Iterator[BrowserContext]:
    """Of most pages of a module: a profile of its own costs Chromium more than what a test does."""
    from browser.chromium import TIMEOUT_MS

    with chromium.new_context() as profile:
        profile.set_default_timeout(TIMEOUT_MS)
        yield profile


@pytest.fixture
def open_page(chromium: Browser, profile: BrowserContext) -> Iterator[OpenPage]:
    """Open the page of a server, connected. What it must never do is checked at the end.

    Pages with `is_apart`, whose clock a test sets, and those of other devices have a profile of
    their own. In that of all others nothing is left of them.
    """
    from browser.chromium import TIMEOUT_MS

    watches: list[_Watch] = []
    apart: list[BrowserContext] = []

    def open_one(
        server: PageServer,
        *,
        pace: str = "live",
        script: str = "",
        is_apart: bool = False,
        **options: Any,
    ) -> Page:
        media = {name: options.pop(name) for name in MEDIA if name in options}
        if is_apart or options.keys() - {"viewport"}:
            context = chromium.new_context(**options)
            context.set_default_timeout(TIMEOUT_MS)
            apart.append(context)
            page = context.new_page()
        else:
            page = profile.new_page()
            page.set_viewport_size(options.get("viewport", DESKTOP))
        page.emulate_media(**media)
        if pace != "live":
            page.add_init_script(f"if (location.host) localStorage['d2f.pace'] ??= '\"{pace}\"'")
        if script:
            page.add_init_script(script)  # before the page's own
        watches.append(_Watch(page, server.url))
        page.goto(server.url)
        return page

    yield open_one
    for context in apart:
        context.close()
    for watch in watches:
        if not watch.page.is_closed():
            watch.forget()
            watch.page.close()
    for watch in watches:
        watch.check()


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer("0123456789" * 12) as server:
        yield server


@pytest.fixture(scope="module")
def page(chromium: Browser, server: ScriptedServer) -> Iterator[Page]:
    page = chromium.new_page()
    page.goto(server.url + "d2f-client.d.ts")  # any document of the origin
    yield page
    page.close()


class _Watch:
    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self._host = urlsplit(url).netloc
        self._urls: list[str] = []
        self._errors: list[str] = []
        page.on("request", self._note_request)
        page.on("websocket", self._note_websocket)
        page.on("console", self._note_console)
        page.on("pageerror", lambda error: self._errors.append(str(error)))

    def forget(self) -> None:
        """Remove what the page has stored: another server may get its port."""
        self.page.goto("about:blank")  # else it may be writing still, and find its database gone
        session = self.page.context.new_cdp_session(self.page)
        wanted = {"origin": f"http://{self._host}", "storageTypes": "all"}
        session.send("Storage.clearDataForOrigin", wanted)

    def check(self) -> None:
        foreign = [url for url in self._urls if urlsplit(url).netloc not in ("", self._host)]
        assert foreign == []
        assert [url for url in self._urls if "token" in url.lower()] == []
        assert self._errors == []

    def _note_request(self, request: Request) -> None:
        self._urls.append(request.url)

    def _note_websocket(self, socket: WebSocket) -> None:
        self._urls.append(socket.url)

    def _note_console(self, message: ConsoleMessage) -> None:
        is_expected = any(text in message.text for text in EXPECTED_ERRORS)
        if message.type in ("error", "warning") and not is_expected:
            self._errors.append(message.text)


@contextmanager
def offline(page: Page, server: PageServer) -> Iterator[None]:
    """Cut the page off, as a lost network does, and connect it again at the end."""
    page.context.set_offline(True)
    server.sever()
    try:
        yield
    finally:
        page.context.set_offline(False)
