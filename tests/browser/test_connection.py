"""The chat page over a connection that breaks, a reload, and a server that starts anew."""

from collections.abc import Iterator

import pytest

import fakes
from browser.axe import faults
from browser.chromium import expect
from browser.conftest import OpenPage, offline
from browser.page_server import ScriptedServer
from browser.reader import (
    BLOCKS,
    STEPS_A_BLOCK,
    announced,
    answer,
    ask,
    expect_answer,
    expect_idle,
    expect_kept,
)

pytestmark = pytest.mark.browser


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


def test_lost_network_is_told_and_the_answer_goes_on_exactly(
    server: ScriptedServer, open_page: OpenPage
) -> None:
    page = open_page(server)
    ask(page)
    server.gate.let_through(STEPS_A_BLOCK)
    expect_answer(page, BLOCKS[0])
    with offline(page, server):
        expect(page.locator("#state")).to_have_text("Reconnecting")
        expect(page.locator("#banner")).to_be_visible()
        server.gate.let_through(2 * STEPS_A_BLOCK)  # while nobody listens
    expect(page.locator("#state")).to_have_text("Connected")
    expect(page.locator("#banner")).to_be_hidden()
    expect_answer(page, "".join(BLOCKS))
    server.gate.open()
    expect_idle(page)
    assert answer(page) == fakes.ANSWER
    assert "".join(announced(page)) == fakes.ANSWER


def test_reload_in_mid_stream_reads_on(server: ScriptedServer, open_page: OpenPage) -> None:
    page = open_page(server)
    ask(page)
    server.gate.let_through(2 * STEPS_A_BLOCK)
    expect_answer(page, "".join(BLOCKS[:2]))
    page.reload()
    expect_answer(page, "".join(BLOCKS[:2]))
    server.gate.open()
    expect_idle(page)
    assert answer(page) == fakes.ANSWER
    expect_kept(page)
    page.reload()
    expect_answer(page, fakes.ANSWER)
    expect_idle(page)
    assert announced(page) == []


def test_reload_before_the_first_step_starts_no_second_answer(
    server: ScriptedServer, open_page: OpenPage
) -> None:
    page = open_page(server)
    ask(page)
    expect(page.locator("#conversation .mask").first).to_be_visible()
    page.reload()
    server.gate.open()
    expect_idle(page)
    assert answer(page) == fakes.ANSWER
    assert server.num_streams == 1


def test_restarted_server_is_told_in_one_sentence(
    server: ScriptedServer, open_page: OpenPage
) -> None:
    page = open_page(server)
    ask(page)
    server.gate.let_through(STEPS_A_BLOCK)
    expect_answer(page, BLOCKS[0])
    with offline(page, server):
        server.stop()
        server.start()
    expect(page.get_by_role("alert")).to_contain_text("no longer knows this answer")
    expect_answer(page, BLOCKS[0])
    server.gate.open()
    page.get_by_role("button", name="Ask again").click()
    expect_idle(page)
    assert answer(page) == fakes.ANSWER
    expect(page.locator(".question")).to_have_count(1)


def test_server_that_stays_away_is_given_up_and_the_answer_read_on_later(
    server: ScriptedServer, open_page: OpenPage
) -> None:
    page = open_page(server, is_apart=True)
    page.clock.install()
    ask(page)
    server.gate.let_through(STEPS_A_BLOCK)
    expect_answer(page, BLOCKS[0])
    with offline(page, server):
        state = page.locator("#state")
        while state.text_content() != "Not connected":
            page.clock.run_for(10_000)
    expect(page.get_by_role("alert")).to_contain_text("could not be reached for 120 s")
    assert faults(page) == []
    server.gate.open()
    page.get_by_role("button", name="Read on").click()
    expect_idle(page)
    assert answer(page) == fakes.ANSWER
    expect(page.locator("#banner")).to_be_hidden()
