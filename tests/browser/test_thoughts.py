"""What a model thinks before it answers: folded, and no part of the answer."""

import pytest

from browser.axe import faults
from browser.chromium import expect
from browser.conftest import OpenPage
from browser.page_server import ScriptedServer
from browser.reader import STEPS_A_BLOCK, announced, answer, ask, expect_idle, expect_kept

pytestmark = pytest.mark.browser

THINKING = "<think>\nLet me see: *two*.\n</think>\n\nIt is **two**."


def test_thought_is_folded_and_the_answer_stands_by_itself(open_page: OpenPage) -> None:
    with ScriptedServer(THINKING) as server:
        page = open_page(server)
        ask(page, "How many?")
        server.gate.let_through(2 * STEPS_A_BLOCK)
        thought = page.locator(".thought")
        expect(thought.locator("summary")).to_have_text("Thinking")
        expect(thought.locator(".text")).to_be_hidden()
        thought.locator("summary").click()
        expect(thought.locator(".text")).to_contain_text("Let me")
        assert faults(page) == []
        server.gate.open()
        expect_idle(page)
        expect(thought.locator("summary")).to_have_text("Thoughts, 4 words")
        assert thought.locator(".text").text_content() == "Let me see: *two*.\n"
        assert answer(page) == "It is two."
        assert announced(page) == ["It is two."]
        ask(page, "And now?")
        expect_idle(page)
        assert server.prompts[-1] == (
            "user: How many?\nassistant: It is **two**.\nuser: And now?\nassistant: "
        )
        expect_kept(page)
        page.reload()
        expect(page.locator(".thought")).to_have_count(2)
        assert answer(page) == "It is two."


CASES: list[tuple[str, str | None, str]] = [  # an answer, what of it is thought, and what is said
    ("<think></think>Yes.", "", "Yes."),
    (" <think>cut off", "cut off", ""),
    ("<thin ice", None, "<thin ice"),
    ("a <think>b</think>", None, "a <think>b</think>"),
    ("<think>a </thin b</think>c", "a </thin b", "c"),
    ("Let me see, twice.\n\nOr so.\n</think>\n\nYes.", "Let me see, twice.\n\nOr so.\n", "Yes."),
    ("</think>Yes.", "", "Yes."),
    ("So </think>?\n</think>No.", "So </think>?\n", "No."),
    ("Write </think> so.", None, "Write </think> so."),
]


def test_only_a_whole_mark_at_the_beginning_begins_a_thought(open_page: OpenPage) -> None:
    answers = (text for text, _, _ in CASES)
    with ScriptedServer(lambda _: next(answers), is_held=False) as server:
        page = open_page(server)
        for number, (text, thought, said) in enumerate(CASES, 1):
            ask(page)
            expect(page.locator(".answer .foot .actions")).to_have_count(number)
            assert answer(page) == said, text
            found = page.locator(".turn:last-child .thought .text")
            assert (found.text_content() if found.count() else None) == thought, text


def test_end_of_a_thought_in_code_is_code(open_page: OpenPage) -> None:
    with ScriptedServer("Such as:\n\n```\n</think>\n```\n", is_held=False) as server:
        page = open_page(server)
        ask(page)
        expect_idle(page)
        expect(page.locator(".answer .foot button").first).to_be_visible()
        expect(page.locator(".thought")).to_have_count(0)
        expect(page.locator(".answer pre")).to_contain_text("</think>")


def test_thought_that_the_template_began_is_no_part_of_the_conversation(
    open_page: OpenPage,
) -> None:
    with ScriptedServer("Let me see.\n\nTwo.\n</think>\n\nIt is two.", is_held=False) as server:
        page = open_page(server)
        ask(page, "How many?")
        expect_idle(page)
        assert answer(page) == "It is two."
        assert announced(page) == ["It is two."]
        ask(page, "And now?")
        expect_idle(page)
        assert server.prompts[-1] == (
            "user: How many?\nassistant: It is two.\nuser: And now?\nassistant: "
        )
