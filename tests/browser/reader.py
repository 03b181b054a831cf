"""What a reader does on the page, and sees there. The answer is `fakes.ANSWER`."""

import re

from browser.chromium import Page, expect

BLOCKS = ["Block di", "ffusion ", "writes w"]
STEPS_A_BLOCK = 2

TEXT = """() => {
    const last = document.querySelector(".turn:last-child .prose")?.cloneNode(true);
    if (!last) return "";
    for (const canvas of last.querySelectorAll(".canvas")) canvas.remove();
    return last.textContent;
}"""


def ask(page: Page, question: str = "What writes blocks?") -> None:
    prompt = page.get_by_label("Your question")
    prompt.fill(question)
    prompt.press("Enter")


def answer(page: Page) -> str:
    """The final text of the last answer, as it is shown; drawn without spaces at its ends."""
    return str(page.evaluate(TEXT)).strip()


def expect_answer(page: Page, text: str) -> None:
    page.wait_for_function(f"(text) => ({TEXT})().trim() === text", arg=text.strip())


def expect_idle(page: Page) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.locator(".answer[aria-busy]")).to_have_count(0)


def expect_kept(page: Page) -> None:
    """Wait until the browser has stored the end of every answer."""
    page.wait_for_function(
        """async () => {
            const { ChatStore } = await import("/chats/store.js");
            const store = new ChatStore();
            const chats = await store.chats();
            const found = await Promise.all(chats.map(({ id }) => store.read(id)));
            const turns = found.flatMap(({ turns }) => [...turns.values()]);
            return turns.every(({ status }) => status !== "running");
        }"""
    )


def announced(page: Page) -> list[str]:
    return page.locator("#announcer p").all_text_contents()


def used_tokens(page: Page) -> int:
    """What the meter says."""
    sentence = page.get_by_role("meter", name="Context").get_attribute("aria-valuetext") or ""
    found = re.search(r"([\d,]+) of", sentence)
    assert found is not None
    return int(found[1].replace(",", ""))
