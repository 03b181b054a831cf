"""The examples of d2f-client.js, from a page of another origin."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import fakes
from browser.chromium import Browser, expect
from browser.page_server import ScriptedServer
from d2f_stream.server.auth import Auth

pytestmark = pytest.mark.browser
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def examples_url() -> Iterator[str]:
    """The address of the examples, as `python -m http.server` serves them."""
    handler = partial(QuietHandler, directory=EXAMPLES)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_example_streams_from_a_page_of_another_origin(
    chromium: Browser, examples_url: str
) -> None:
    with ScriptedServer(is_held=False, auth=Auth(origins=(examples_url,))) as server:
        page = chromium.new_page()
        page.goto(f"{examples_url}/browser.html?server={server.url.rstrip('/')}")
        page.get_by_role("button", name="Ask").click()
        expect(page.locator("#answer")).to_have_text(fakes.ANSWER)
        expect(page.locator("#state")).to_have_text("open")
        page.close()


def test_example_is_short() -> None:
    assert len((EXAMPLES / "browser.html").read_text(encoding="utf-8").splitlines()) <= 60
