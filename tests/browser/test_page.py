"""The chat page over a scripted model whose steps the test lets through, in a real Chromium."""

from collections.abc import Iterator

import pytest

import d2f_stream
import fakes
from browser.chromium import expect
from browser.conftest import OpenPage
from browser.page_server import PageServer, ScriptedServer
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
from d2f_runtime.backends.scripted import ByteCodec
from d2f_stream.core.errors import NoChatTemplate
from d2f_stream.server.auth import Auth

pytestmark = pytest.mark.browser

TOKEN = "0123456789abcdef0123"

# The browser opens no database before `letOpen()`.
HOLD_DATABASE = """(() => {
    const held = new Promise((resolve) => { window.letOpen = resolve; });
    const listen = EventTarget.prototype.addEventListener;
    IDBOpenDBRequest.prototype.addEventListener = function (type, act, ...more) {
        const late = type === "success" ? (event) => held.then(() => act(event)) : act;
        listen.call(this, type, late, ...more);
    };
})()"""


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


def test_blocks_appear_whole_one_after_the_other(
    server: ScriptedServer, open_page: OpenPage
) -> None:
    page = open_page(server)
    ask(page)
    expect(page.locator("#conversation .mask").first).to_be_visible()
    for number in range(len(BLOCKS)):
        server.gate.let_through(STEPS_A_BLOCK)
        expect_answer(page, "".join(BLOCKS[: number + 1]))
    server.gate.open()
    expect_idle(page)
    assert answer(page) == fakes.ANSWER
    figures = page.locator(".figures")
    expect(figures).to_contain_text("tokens per step")
    expect(figures).to_contain_text("tokens/s")
    expect(figures).to_contain_text("to the first block")


def test_questions_wait_for_their_chat_and_for_nothing_else(
    server: ScriptedServer, open_page: OpenPage
) -> None:
    server.gate.open()
    page = open_page(server, script=HOLD_DATABASE)
    ask(page)  # in a new chat, which can be open before the database is
    expect_answer(page, fakes.ANSWER)
    page.evaluate("letOpen()")
    expect_kept(page)
    page.reload()
    ask(page, "And what reads them?")
    assert page.get_by_label("Your question").input_value() == "And what reads them?"
    page.evaluate("letOpen()")
    expect(page.locator(".answer")).to_have_count(2)
    expect_idle(page)
    expect_answer(page, fakes.ANSWER)


def test_canvas_shows_each_accepted_token_and_keeps_masks(
    server: ScriptedServer, open_page: OpenPage
) -> None:
    page = open_page(server)
    ask(page)
    server.gate.let_through(1)
    first = page.locator(".canvas .block").first
    expect(first.locator(".token")).to_have_text(list(BLOCKS[0][:4]))
    expect(first.locator(".mask")).to_have_count(4)
    assert page.locator(".canvas").get_attribute("aria-hidden") == "true"
    server.gate.let_through(1)
    expect_answer(page, BLOCKS[0])
    expect(first.locator(".mask")).to_have_count(8)  # the next block


def test_answer_without_a_word_says_so_and_what_the_model_is_for(open_page: OpenPage) -> None:
    with ScriptedServer("", is_held=False, about={"description": "Adds numbers."}) as server:
        page = open_page(server)
        ask(page, "Hello!")
        note = page.locator(".answer .note")
        expect(note).to_have_text(
            "The model ended its answer at once, without a word. What it is for: Adds numbers."
        )
        expect(note).to_have_attribute("role", "status")


def test_without_canvas_only_whole_blocks_are_shown(
    server: ScriptedServer, open_page: OpenPage
) -> None:
    page = open_page(server)
    page.get_by_text("Canvas", exact=True).click()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_role("radio", name="Slow")).to_be_disabled()
    page.keyboard.press("Escape")
    ask(page)
    server.gate.let_through(STEPS_A_BLOCK + 1)
    expect_answer(page, BLOCKS[0])
    expect(page.locator("#conversation .mask, #conversation .token")).to_have_count(0)


def test_stop_keeps_what_was_committed(open_page: OpenPage) -> None:
    endless = "on and on, " * 400
    with ScriptedServer(endless, max_new_tokens=4000) as server:
        page = open_page(server)
        ask(page)
        server.gate.let_through(STEPS_A_BLOCK + 1)
        expect_answer(page, endless[:8])
        page.get_by_role("button", name="Stop").click()
        note = page.locator(".note")
        while not note.is_visible():
            server.gate.let_through(1)  # the server may learn of it in the middle of any step
        expect(note).to_have_text("Stopped.")
        expect_idle(page)
        assert answer(page).startswith(endless[:8])
        assert endless.startswith(answer(page))
        assert len(answer(page)) < 4000
        expect(page.locator("#conversation .mask")).to_have_count(0)


def test_too_long_question_can_be_edited(server: ScriptedServer, open_page: OpenPage) -> None:
    page = open_page(server)
    question = "why " * 1200
    ask(page, question)
    expect(page.get_by_role("alert")).to_contain_text("but the model holds 4096 in all")
    fold = page.get_by_role("button", name="Show the whole question")
    expect(fold).to_have_attribute("aria-expanded", "false")
    fold.click()
    expect(page.get_by_role("button", name="Show less")).to_be_visible()
    page.get_by_role("button", name="Edit and ask again").click()
    expect(page.get_by_label("Your question", exact=True)).to_have_value(question.strip())
    expect(page.locator(".question")).to_have_count(0)


class PlainCodec(ByteCodec):
    """Of a model without a chat template."""

    def render(self, messages: object) -> str:
        del messages
        raise NoChatTemplate("the model has no chat template; pass the prompt as one string")


def test_model_without_chat_template_gets_the_plain_question(open_page: OpenPage) -> None:
    with ScriptedServer(is_held=False, codec=PlainCodec()) as server:
        page = open_page(server)
        ask(page, "Go on")
        expect_idle(page)
        assert answer(page) == fakes.ANSWER
        assert server.prompts == ["Go on"]


def test_conversation_so_far_is_sent_with_the_next_question(open_page: OpenPage) -> None:
    with ScriptedServer("Four.", is_held=False) as server:
        page = open_page(server)
        for number, question in enumerate(("Two and two?", "Sure?"), 1):
            ask(page, question)
            expect(page.locator(".answer:not([aria-busy])")).to_have_count(number)
        assert server.prompts[1] == "user: Two and two?\nassistant: Four.\nuser: Sure?\nassistant: "


def test_settings_begin_with_the_models_own_and_are_sent(
    server: ScriptedServer, open_page: OpenPage
) -> None:
    page = open_page(server)
    page.get_by_role("button", name="Settings").click()
    size = page.get_by_label("Block size")
    expect(size).to_have_value("8")
    expect(page.get_by_label("Longest answer")).to_have_value("128")
    size.fill("16")
    page.get_by_label("Active blocks").fill("")
    expect(size).to_have_attribute("aria-invalid", "false")
    page.get_by_label("Longest answer").fill("0")
    expect(page.get_by_text("Enter a number from 1 to 4096")).to_be_visible()
    page.get_by_label("Longest answer").fill("64")
    page.get_by_label("Stop strings").fill("whole\ntokens")
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_role("button", name="Done").click()
    ask(page)
    server.gate.open()
    expect_idle(page)
    assert server.block_sizes == {16}
    assert answer(page) == "Block diffusion writes"
    assert server.prompts == ["system: Be brief.\nuser: What writes blocks?\nassistant: "]
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Model's defaults").click()
    expect(size).to_have_value("8")


def test_server_that_wants_a_token_is_given_one(open_page: OpenPage) -> None:
    with ScriptedServer(is_held=False, auth=Auth({"me": TOKEN})) as server:
        page = open_page(server)
        field = page.get_by_label("Token", exact=True)
        expect(field).to_be_focused()
        expect(page.get_by_text("That token was not accepted.")).to_be_hidden()
        field.fill("a-wrong-one-of-some-length")
        field.press("Enter")
        expect(page.get_by_text("That token was not accepted.")).to_be_visible()
        field.fill(TOKEN)
        field.press("Enter")
        expect(page.locator("#state")).to_have_text("Connected")
        page.reload()
        expect(page.locator("#state")).to_have_text("Connected")
        ask(page)
        expect_idle(page)
        assert answer(page) == fakes.ANSWER
        assert TOKEN not in page.evaluate("JSON.stringify(localStorage)")


def test_slow_motion_delays_the_picture_and_nothing_else(open_page: OpenPage) -> None:
    with ScriptedServer(is_held=False) as server:
        page = open_page(server, pace="slow", is_apart=True)
        page.clock.install(time=0)
        page.clock.pause_at(10)
        ask(page)
        skip = page.get_by_role("button", name="Show all at once")
        expect(skip).to_be_visible()  # the stream is at its end
        assert "".join(announced(page)) == fakes.ANSWER
        assert len(answer(page)) < 16
        page.clock.run_for(3000)
        expect_idle(page)
        assert answer(page) == fakes.ANSWER


def test_keyboard_alone_asks_stops_and_sets(server: ScriptedServer, open_page: OpenPage) -> None:
    page = open_page(server)
    keyboard = page.keyboard
    expect(page.get_by_label("Your question")).to_be_focused()
    keyboard.type("One line")
    keyboard.press("Shift+Enter")
    keyboard.type("and another")
    keyboard.press("Enter")
    expect(page.locator(".question .text")).to_have_text("One line\nand another")
    server.gate.let_through(STEPS_A_BLOCK)
    expect_answer(page, BLOCKS[0])
    keyboard.press("Tab")
    expect(page.get_by_role("button", name="Stop")).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    keyboard.press("Enter")
    server.gate.open()
    expect(page.get_by_role("button", name="Send")).to_be_focused()
    keyboard.press("Tab")
    keyboard.press("Space")
    expect(page.get_by_role("switch", name="Canvas")).not_to_be_checked()
    keyboard.press("Control+K")
    expect(page.get_by_label("Search the chats")).to_be_focused()
    page.get_by_role("button", name="Settings").focus()
    keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
    keyboard.press("Escape")
    expect(page.get_by_role("button", name="Settings")).to_be_focused()
    keyboard.press("Control+Shift+O")
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.get_by_label("Your question")).to_be_focused()


@pytest.mark.usefixtures("one_core")
def test_embedded_model_answers_its_own_example(open_page: OpenPage) -> None:
    with PageServer(lambda: d2f_stream.load()) as server:
        page = open_page(server)
        expect(page.locator("#model-description")).to_contain_text("arithmetic word problem")
        page.get_by_role("button", name="34 pears").click()
        expect_idle(page)
        assert answer(page).endswith("The answer is 42.")
        assert "".join(announced(page)).strip() == answer(page)
