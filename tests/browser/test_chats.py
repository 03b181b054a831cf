"""Chats: kept, found, renamed, deleted, brought back, over tabs; branches; a full context."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import fakes
from browser.chromium import Page, expect
from browser.conftest import OpenPage
from browser.page_server import ScriptedServer
from browser.reader import (
    BLOCKS,
    STEPS_A_BLOCK,
    answer,
    ask,
    expect_answer,
    expect_idle,
    used_tokens,
)
from d2f_stream.server.limits import ServeLimits

pytestmark = pytest.mark.browser

WIDE = {"width": 1280, "height": 800}


def said(prompt: str) -> str:
    """Answer with the number of questions that the prompt has, and the last one."""
    questions = [line[6:] for line in prompt.split("\n") if line.startswith("user: ")]
    return f"{len(questions)}: {questions[-1]}"


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(said, is_held=False) as server:
        yield server


def titles(page: Page) -> list[str]:
    return page.locator("#chat-list .title").all_text_contents()


def open_chat(page: Page, title: str) -> None:
    page.locator("#chat-list").get_by_role("button", name=title, exact=True).click()


def ask_and_wait(page: Page, question: str, expected: str) -> None:
    ask(page, question)
    expect_answer(page, expected)
    expect_idle(page)


def test_chats_are_kept_found_renamed_deleted_and_brought_back(
    server: ScriptedServer, open_page: OpenPage
) -> None:
    page = open_page(server, viewport=WIDE)
    ask_and_wait(page, "First pear?", "1: First pear?")
    ask_and_wait(page, "And then?", "2: And then?")
    page.get_by_role("button", name="New chat").click()
    ask_and_wait(page, "Second plum?", "1: Second plum?")
    expect(page.locator("#chat-list .title")).to_have_text(["Second plum?", "First pear?"])

    search = page.get_by_label("Search the chats")
    search.fill("then 2:")
    expect(page.locator("#chat-list .title")).to_have_text(["First pear?"])
    search.fill("nowhere")
    expect(page.get_by_text("No chat has these words.")).to_be_visible()
    search.fill("")

    page.get_by_role("button", name="Rename: First pear?").focus()
    page.keyboard.press("Enter")
    name = page.get_by_label("Name of the chat")
    name.fill("Pears")
    name.press("Enter")
    expect(page.locator("#chat-list .title")).to_have_text(["Second plum?", "Pears"])

    open_chat(page, "Pears")
    expect(page).to_have_title("Pears · d2f_stream")
    expect_answer(page, "2: And then?")
    page.get_by_role("button", name="Delete: Pears").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#chat-list .title")).to_have_text(["Second plum?"])
    expect(page.locator("#welcome")).to_be_visible()
    page.get_by_role("button", name="Undo").click()
    expect_answer(page, "2: And then?")
    page.reload()
    expect_answer(page, "2: And then?")
    assert titles(page) == ["Second plum?", "Pears"]
    page.go_back()
    expect(page.locator("#welcome")).to_be_visible()


def test_chats_leave_as_a_file_and_come_back(
    server: ScriptedServer, open_page: OpenPage, tmp_path: Path
) -> None:
    page = open_page(server, viewport=WIDE)
    ask_and_wait(page, "First pear?", "1: First pear?")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all").click()
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    assert path.name == "First pear.json"
    page.get_by_role("button", name="Delete: First pear?").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_text("No chats yet.")).to_be_visible()

    chooser = page.get_by_label("File with chats")
    for content, told in (
        ("[]", "This file holds no chats that this page can read."),
        ("<html>", "This file holds no chats: it is not JSON."),
        ('{"d2f_chats": 1, "chats": [{"title": "A"}]}', "The chat A is damaged."),
    ):
        (tmp_path / "other.json").write_text(content)
        chooser.set_input_files(tmp_path / "other.json")
        expect(page.locator("#toast")).to_contain_text(told)
    chooser.set_input_files(path)
    expect(page.locator("#toast")).to_contain_text("1 chat was imported.")
    chooser.set_input_files(path)
    expect(page.locator("#toast")).to_contain_text("0 chats were imported; 1 were here already.")
    open_chat(page, "First pear?")
    expect_answer(page, "1: First pear?")
    harmless = json.loads(path.read_text())
    harmless["chats"][0]["turns"][0]["text"] = "<img src=x onerror=document.title=1>"
    harmless["chats"][0]["updatedAt"] += 1
    path.write_text(json.dumps(harmless))
    chooser.set_input_files(path)
    expect(page.locator("#toast")).to_contain_text("1 chat was imported.")
    expect_answer(page, "<img src=x onerror=document.title=1>")


def test_questions_are_edited_and_answers_made_again_without_losing_any(
    server: ScriptedServer, open_page: OpenPage
) -> None:
    page = open_page(server)
    ask_and_wait(page, "One?", "1: One?")
    ask_and_wait(page, "Two?", "2: Two?")
    page.get_by_role("button", name="Edit the question").first.click()
    field = page.get_by_label("The question, to be edited")
    field.fill("Another?")
    field.press("Enter")
    expect_answer(page, "1: Another?")
    expect_idle(page)
    expect(page.locator(".question .place")).to_have_text("2 / 2 versions")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".question .place")).to_have_text("3 / 3 versions")
    expect_idle(page)
    page.get_by_role("button", name="Version before").click()
    page.get_by_role("button", name="Version before").click()
    expect_answer(page, "2: Two?")
    page.reload()
    expect_answer(page, "2: Two?")
    assert server.prompts[1] == "user: One?\nassistant: 1: One?\nuser: Two?\nassistant: "


def test_stopped_answer_is_continued_from_where_it_stopped(open_page: OpenPage) -> None:
    with ScriptedServer(
        lambda prompt: fakes.ANSWER[len(prompt.split("assistant: ")[1]) :]
    ) as server:
        page = open_page(server)
        ask(page)
        server.gate.let_through(2 * STEPS_A_BLOCK)
        expect_answer(page, "".join(BLOCKS[:2]))
        page.keyboard.press("Escape")
        note = page.locator(".note")
        while not note.is_visible():
            server.gate.let_through(1)
        server.gate.open()
        kept = answer(page)
        page.get_by_role("button", name="Continue").click()
        expect_answer(page, fakes.ANSWER)
        expect_idle(page)
        assert fakes.ANSWER.startswith(kept)
        expect(page.locator(".turn")).to_have_count(1)
        assert server.prompts[1].startswith("user: What writes blocks?\nassistant: Block di")


def test_full_context_leaves_the_oldest_turns_out_and_says_so(open_page: OpenPage) -> None:
    with ScriptedServer(said, is_held=False, about={"max_len": 240}, max_new_tokens=40) as server:
        page = open_page(server)
        for number in range(1, 9):
            ask(page, f"Question {number}, {'x' * 20}")
            expect(page.locator(".turn")).to_have_count(number)
            expect(page.locator(".answer:not([aria-busy]) .actions")).to_have_count(number)
            assert used_tokens(page) <= 240
        expect(page.get_by_role("alert")).to_have_count(0)
        told = page.locator(".turn").last.locator(".left-out")
        expect(told).to_contain_text("context of 240 tokens is full")
        expect(told).to_contain_text("questions and answers were left out.")
        assert all(len(prompt) < 240 for prompt in server.prompts)
        page.reload()
        expect(told).to_be_visible()
        expect(page.locator(".turn")).to_have_count(8)


def test_server_that_finds_the_prompt_too_long_is_asked_with_less(open_page: OpenPage) -> None:
    """Its limit is lower than the model's, which is all that the page knows."""
    limits = ServeLimits(max_prompt_tokens=150)
    with ScriptedServer(said, is_held=False, limits=limits) as server:
        page = open_page(server)
        for number in range(1, 6):
            ask(page, f"Question {number}, {'x' * 20}")
            expect(page.locator(".answer:not([aria-busy]) .actions")).to_have_count(number)
        expect(page.get_by_role("alert")).to_have_count(0)
        expect(page.locator(".left-out").last).to_contain_text("left out")


def test_tabs_share_chats_and_answers_on_their_way(open_page: OpenPage) -> None:
    with ScriptedServer() as server:
        page = open_page(server, viewport=WIDE)
        other = page.context.new_page()
        other.goto(server.url)
        expect(other.locator("#status")).to_have_attribute("data-state", "open")
        ask(page)
        server.gate.let_through(STEPS_A_BLOCK)
        expect_answer(page, BLOCKS[0])
        open_chat(other, "What writes blocks?")
        expect_answer(other, BLOCKS[0])
        server.gate.open()
        expect_answer(other, fakes.ANSWER)
        expect_answer(page, fakes.ANSWER)
        assert server.num_streams == 1
        ask(other, "Again?")
        expect(page.locator(".turn")).to_have_count(2)
        expect_answer(page, fakes.ANSWER)
        expect_idle(page)
        expect_idle(other)
        other.get_by_role("button", name="Delete: What writes blocks?").focus()
        other.keyboard.press("Enter")
        expect(page.locator("#welcome")).to_be_visible()
        other.close()


def test_answer_goes_on_while_another_chat_is_read(open_page: OpenPage) -> None:
    with ScriptedServer() as server:
        page = open_page(server, viewport=WIDE)
        ask(page)
        server.gate.let_through(STEPS_A_BLOCK)
        expect_answer(page, BLOCKS[0])
        page.get_by_role("button", name="New chat").click()
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        server.gate.let_through(STEPS_A_BLOCK)
        open_chat(page, "What writes blocks? (answering)")
        expect_answer(page, "".join(BLOCKS[:2]))
        server.gate.open()
        expect_answer(page, fakes.ANSWER)
        expect_idle(page)


def test_settings_are_each_chats_own(server: ScriptedServer, open_page: OpenPage) -> None:
    page = open_page(server, viewport=WIDE)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Longest answer").fill("64")
    page.keyboard.press("Escape")
    ask_and_wait(page, "First?", "1: First?")
    page.get_by_role("button", name="New chat").click()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("System prompt")).to_have_value("")
    expect(page.get_by_label("Longest answer")).to_have_value("128")
    page.keyboard.press("Escape")
    page.reload()
    open_chat(page, "First?")
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("System prompt")).to_have_value("Be brief.")
    expect(page.get_by_label("Longest answer")).to_have_value("64")


def test_browser_without_a_database_keeps_chats_as_long_as_the_tab(
    server: ScriptedServer, open_page: OpenPage
) -> None:
    page = open_page(server, viewport=WIDE)
    page.add_init_script("Object.defineProperty(window, 'indexedDB', { value: undefined })")
    page.reload()
    expect(page.get_by_text("chats end with the tab")).to_be_visible()
    ask_and_wait(page, "First?", "1: First?")
    page.get_by_role("button", name="New chat").click()
    open_chat(page, "First?")
    expect_answer(page, "1: First?")
