"""What a reader does on the page, and sees there. The answer is `fakes.ANSWER`."""

from collections.abc import Sequence

from browser.chromium import Page, expect

BLOCKS = ["Block di", "ffusion ", "writes w"]
STEPS_A_BLOCK = 2


def ask(page: Page, question: str = "What writes blocks?") -> None:
    prompt = page.get_by_label("Your question")
    prompt.fill(question)
    prompt.press("Enter")


def blocks(page: Page) -> list[str]:
    return page.locator(".answer .block.final").all_text_contents()


def expect_blocks(page: Page, texts: Sequence[str]) -> None:
    expect(page.locator(".answer .block.final")).to_have_text(list(texts), use_inner_text=False)


def expect_idle(page: Page) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def announced(page: Page) -> list[str]:
    return page.locator("#announcer p").all_text_contents()


def answer(page: Page) -> str:
    return "".join(blocks(page))
