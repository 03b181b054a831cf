"""The pictures of the documentation: python -m lab.pictures --output docs.

Each shows the shipped model amid an answer: the chat page in Chromium, over a server of its own,
and the terminal's canvas. Needs Playwright and a Chromium on the PATH.
"""

import argparse
import asyncio
import io
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.text import Text

import d2f_stream
from d2f_stream.core.events import Block
from d2f_stream.terminal.canvas import Canvas

if TYPE_CHECKING:
    from playwright.sync_api import Browser

__all__ = ["drawing_of", "main"]

MODEL: Final = Path(__file__).parents[1] / "models/smollm2-135m-d2f/smollm2_135m_d2f/model"
EARLIER: Final = ("What is the capital of France?", "Who are you?")
QUESTION: Final = "Why is the sky blue?"
LETTERS: Final = 520  # of the answer, when the page's picture is taken
BLOCKS: Final = 24  # of the answer, when the terminal's is
COLUMNS: Final = 84
TIMEOUT_MS: Final = 240_000


class _Drawing(Canvas):
    """A canvas without figures, which would be this machine's."""

    def _draw_figures(self) -> list[Text]:
        return []


def main(argv: list[str] | None = None) -> None:
    """Write both pictures."""
    parser = argparse.ArgumentParser(prog="python -m lab.pictures", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the folder of the pictures")
    parser.add_argument("--model", default=str(MODEL), help="instead of the shipped one")
    arguments = parser.parse_args(argv)
    drawing = asyncio.run(drawing_of(arguments.model, QUESTION))
    with _chromium() as browser:
        _page(browser, arguments.model, arguments.output / "page-desktop-light.png")
        _terminal(browser, drawing, arguments.output / "canvas.png")


async def drawing_of(model: str, question: str) -> str:
    """Return the canvas of a terminal amid an answer, as an SVG."""
    canvas, num_blocks = _Drawing(question), 0
    async with (
        d2f_stream.load(model) as engine,
        engine.generate(question, raw=False, drafts=True, temperature=0.0) as session,
    ):
        async for event in session.events():
            canvas.apply(event)
            num_blocks += isinstance(event, Block)
            if num_blocks > BLOCKS and not isinstance(event, Block):
                break
    console = Console(record=True, file=io.StringIO(), force_terminal=True, width=COLUMNS)
    console.print(canvas)
    return console.export_svg(title="d2f-stream generate")


def _page(browser: "Browser", model: str, path: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    page.set_default_timeout(TIMEOUT_MS)
    with _server(model) as url:
        page.goto(url)
        for question in (*EARLIER, QUESTION):
            page.get_by_placeholder("Ask a question").fill(question)
            page.keyboard.press("Enter")
            if question == QUESTION:
                break
            page.get_by_role("button", name="Stop").wait_for()
            page.get_by_role("button", name="Stop").wait_for(state="hidden")
            page.get_by_role("button", name="New chat").click()
        page.wait_for_function(
            "letters => document.querySelector('#conversation').innerText.length > letters",
            arg=LETTERS,
        )
        page.locator("#conversation .mask").first.wait_for()
        figures = page.locator(".answer .figures").last  # see _Drawing
        figures.evaluate("element => element.style.visibility = 'hidden'")
        page.screenshot(path=path)
    page.close()


def _terminal(browser: "Browser", drawing: str, path: Path) -> None:
    page = browser.new_page()
    page.set_content(f"<style>body {{ margin: 0 }} svg {{ width: 1094px }}</style>{drawing}")
    page.locator("svg").screenshot(path=path, omit_background=True)
    page.close()


@contextmanager
def _chromium() -> Iterator["Browser"]:
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=arguments
        )
        yield browser
        browser.close()


@contextmanager
def _server(model: str) -> Iterator[str]:
    """Serve the model in a process of its own; yield the page's address once it is there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "d2f_stream.cli",
        "serve",
        "--model",
        model,
        "--port",
        str(port),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if str(port) in line:
                break
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.communicate()


if __name__ == "__main__":
    main()
