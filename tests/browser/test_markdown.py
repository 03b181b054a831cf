"""Answers as Markdown: what is finished stays, what is open is shown, nothing harms the page."""

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from browser.chromium import Browser, Page
from browser.page_server import ScriptedServer

pytestmark = pytest.mark.browser

TOUR = """Here is a **short tour** of `inline code`, a [link](https://example.org/a) and $5.

# Things

1. First, prepare.
2. Then train:
   - a *warm-up*,
   - the rest.

3. Loose at last.
#hashtag is no heading
***bold and italic*** ends it

## Code

```python
def f(x):
    # a comment

    return "```" + x
```
~~~
not ``` closed by backticks
~~~

    indented

    code

| A | B |
|---|--:|
| 1 | *2* |
| 3 | 4 |
> a quote
> of two lines

> another

Euler: $e^{i\\pi} + 1 = 0$, and alone:

$$
\\frac{1}{2}
$$

Prose on
two lines
---
- a
- b

* another list
+ and another

The end of `it`."""

PRELUDE = """async (given) => {
    const { MarkdownFeed } = await import("/answer/feed.js");
    const { Document } = await import("/answer/markdown.js");
    const { patch } = await import("/answer/patch.js");
    const { AnswerView } = await import("/answer/view.js");
    const { copyText } = await import("/copy.js");
    const html = (nodes) => {
        const root = document.createElement("div");
        root.append(...nodes);
        return root.innerHTML.replaceAll("\\n<", "<");
    };
    const block = (text, index) => ({
        type: "block.committed", index, text, progress: { steps: 0 },
    });
    const turn = { text: "", status: "running", error: null, progress: { steps: 0 } };
"""


@pytest.fixture(scope="module")
def page(chromium: Browser) -> Iterator[Page]:
    with ScriptedServer("unused") as server:
        page = chromium.new_page()
        page.goto(server.url)
        yield page
        page.close()


def run(page: Page, body: str, given: Any = None) -> Any:
    """Run the body of a function in the page; what it returns."""
    return page.evaluate(PRELUDE + body + "\n}", given)


def cut(text: str, seed: int) -> list[str]:
    """Cut a text into pieces of one to forty characters."""
    draw, pieces = random.Random(seed), []
    while text:
        size = draw.randint(1, 40)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


@pytest.mark.parametrize("seed", range(4))
def test_blocks_drawn_one_by_one_are_those_of_the_whole_text(page: Page, seed: int) -> None:
    """The oracle is markdown-it on the whole; whatever the cuts."""
    found = run(
        page,
        """
        const feed = new MarkdownFeed();
        const parts = new Document();
        const sources = [...given.pieces.flatMap((piece) => feed.push(piece)), ...feed.end()];
        return {
            inParts: html(sources.flatMap((source) => [...parts.render(source).childNodes])),
            whole: html([...new Document().render(given.text).childNodes]),
            numBlocks: sources.length,
        };
        """,
        {"text": TOUR, "pieces": cut(TOUR, seed)},
    )
    assert found["inParts"] == found["whole"]
    assert found["numBlocks"] == 17


@pytest.mark.parametrize("seed", range(2))
def test_what_is_finished_is_never_touched_and_never_moves(page: Page, seed: int) -> None:
    """Layout shift of final text, measured: by place and by the browser's own count."""
    found = run(
        page,
        """
        const view = new AnswerView(turn);
        document.getElementById("welcome").hidden = true;
        document.getElementById("conversation").append(view.root);
        const changes = [], moves = [], known = new Map();
        const observer = new MutationObserver((records) => changes.push(...records));
        const shifts = new PerformanceObserver(() => {});
        shifts.observe({ type: "layout-shift" });
        const place = (node) => {
            const range = document.createRange();
            range.selectNodeContents(node);
            return [...range.getClientRects()].map(({ x, y, width, height }) =>
                [x, y + scrollY, width, height]).join();
        };
        for (const [index, piece] of given.entries()) {
            const masks = { filled: Array(8).fill(false), texts: Array(8).fill("") };
            view.show({ type: "block.draft", index: index + 1, ...masks });
            view.show(block(piece, index));
            await new Promise(requestAnimationFrame);
            for (const [part, where] of known) {
                if (place(part) !== where) moves.push(part.outerHTML);
            }
            for (const part of view.root.querySelectorAll(".part.final")) {
                if (known.has(part)) continue;
                known.set(part, place(part));
                const kinds = { childList: true, characterData: true, attributes: true };
                observer.observe(part, { subtree: true, ...kinds });
            }
        }
        changes.push(...observer.takeRecords());
        const shifted = shifts.takeRecords().flatMap(({ sources }) => sources)
            .filter(({ node }) => node?.parentElement?.closest(".part.final"));
        view.root.remove();
        return { numKnown: known.size, moves, numChanges: changes.length, shifted: shifted.length };
        """,
        cut(TOUR, seed),
    )
    assert found == {"numKnown": 16, "moves": [], "numChanges": 0, "shifted": 0}


def test_open_block_keeps_the_nodes_that_it_has(page: Page) -> None:
    found = run(
        page,
        """
        const view = new AnswerView(turn);
        view.show(block("A list:\\n\\n- one **bo", 0));
        const item = view.root.querySelector("li");
        const bold = item.querySelector("strong");
        view.show(block("ld**\\n- two", 1));
        const items = [...view.root.querySelectorAll("li")];
        return {
            isSame: items[0] === item && item.querySelector("strong") === bold,
            texts: items.map(({ textContent }) => textContent),
        };
        """,
    )
    assert found == {"isSame": True, "texts": ["one bold", "two"]}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("text\n#", "text"),
        ("text\n-", "text"),
        ("text\n``", "text"),
        ("text\n12", "text"),
        ("| a | b |", ""),
        ("| a | b |\n|--", ""),
        ("a **bold", "a bold"),
        ("see [this](https://exam", "see this"),
        ("```py\nx = 1\n#", "x = 1\n#"),
    ],
)
def test_line_that_may_still_become_anything_waits(page: Page, text: str, shown: str) -> None:
    body = """
        const view = new AnswerView(turn);
        view.show(block(given, 0));
        const code = view.root.querySelector("code");
        return (code ?? view.root.querySelector(".prose")).textContent.trim();
    """
    assert run(page, body, text) == shown


HARMFUL = [
    "<script>document.title = 'harmed'</script>",
    "<img src=x onerror=\"document.title = 'harmed'\">",
    "[here](javascript:document.title='harmed')",
    "![x](https://example.org/spy.png)",
    "$\\href{javascript:alert(1)}{x}$",
    "```x\" onmouseover=\"document.title='harmed'\ncode\n```",
    "<math><mtext></mtext><style><img src=x onerror=document.title='harmed'></style></math>",
    "| a |\n|---|\n| <iframe src=//example.org> |",
    "<a href=x style='position:fixed;inset:0'>x</a>",
]


@pytest.mark.parametrize("text", HARMFUL)
def test_nothing_of_an_answer_harms_the_page(page: Page, text: str) -> None:
    found = run(
        page,
        """
        const view = new AnswerView(turn);
        document.querySelector("main").append(view.root);
        view.show(block(given + "\\n\\nend", 0));
        await new Promise((resolve) => setTimeout(resolve));
        const all = [...view.root.querySelectorAll(".prose *")];
        view.root.remove();
        return {
            title: document.title,
            names: all.map(({ localName }) => localName)
                .filter((name) => /^(script|img|iframe|style|object|form)$/.test(name)),
            attributes: all.flatMap((one) => [...one.attributes])
                .map(({ name, value }) => `${name}=${value}`)
                .filter((attribute) => /^(on|style|src)|javascript:/.test(attribute)),
        };
        """,
        text,
    )
    assert found == {"title": "d2f_stream", "names": [], "attributes": []}


def test_formulas_code_and_tables_are_set(page: Page) -> None:
    found = run(
        page,
        """
        const root = document.createElement("div");
        root.append(new Document().render(given));
        const texts = (selector) =>
            [...root.querySelectorAll(selector)].map((one) => one.textContent);
        return {
            formulas: root.querySelectorAll("math").length,
            display: root.querySelectorAll("math[display=block]").length,
            tex: texts("code.tex"),
            keywords: texts(".hljs-keyword"),
            cells: texts("td"),
            right: texts(".right"),
            headings: texts("h4, h5, h6"),
            prices: root.querySelector("p").textContent,
        };
        """,
        "From $5 to $6.\n\n# A\n\n### B\n\n$x^2$ and \\(y\\) and $\\nonsense{$\n\n$$z$$\n\n"
        "```js\nconst a = 1;\n```\n\n| a | b |\n|---|--:|\n| 1 | 2 |",
    )
    assert found == {
        "formulas": 3,
        "display": 1,
        "tex": ["\\nonsense{"],
        "keywords": ["const"],
        "cells": ["1", "2"],
        "right": ["b", "2"],
        "headings": ["A", "B"],
        "prices": "From $5 to $6.",
    }


def test_code_is_copied_without_a_clipboard_as_on_plain_http(page: Page) -> None:
    found = run(
        page,
        """
        Object.defineProperty(navigator, "clipboard", { value: undefined, configurable: true });
        const field = document.getElementById("prompt");
        field.focus();
        let copied = null;
        const note = () => (copied = document.activeElement.value);
        document.addEventListener("copy", note, { once: true });
        const worked = await copyText("def f():\\n    pass\\n");
        return { worked, copied, isBack: document.activeElement === field };
        """,
    )
    assert found == {"worked": True, "copied": "def f():\n    pass\n", "isBack": True}


def test_pace_never_falls_three_seconds_behind(page: Page) -> None:
    """Of steps that come in bursts, by a clock of the test's own; and it is kept in between."""
    page.clock.install(time=0)
    found = page.evaluate(
        """async ({ waits, stepMs }) => {
            const { Player } = await import("/answer/player.js");
            const came = [], lags = [], gaps = [];
            let last = null;
            const player = new Player((event) => {
                const now = performance.now();
                lags.push(now - came[event.number]);
                if (last !== null) gaps.push(now - last);
                last = now;
            }, stepMs);
            window.step = (number) => {
                came.push(performance.now());
                player.push({ index: 0, number });
            };
            window.lags = lags;
            window.gaps = gaps;
        }""",
        {"waits": [], "stepMs": 900},
    )
    assert found is None
    page.clock.pause_at(1000)
    draw = random.Random(7)
    for number in range(60):
        page.evaluate("(number) => step(number)", number)
        page.clock.run_for(draw.choice([0, 0, 0, 20, 700]))
    page.clock.run_for(4000)
    lags, gaps = json.loads(page.evaluate("JSON.stringify([lags, gaps])"))
    assert len(lags) == 60
    assert max(lags) <= 3000 + 2
    assert max(gaps) >= 300
