"""The page's records: branches of a chat, what is sent of it, files that come from anywhere."""

from collections.abc import Iterator
from typing import Any

import pytest

from browser.chromium import Browser, Page
from browser.page_server import ScriptedServer

pytestmark = pytest.mark.browser

PRELUDE = """async (given) => {
    const { newTurn, apply, askAgain, startOver, pathTo, alternatives, newestLeaf } =
        await import("/chats/turn.js");
    const { messagesFor, numToLeaveOut, use, charsOf } = await import("/ask/context.js");
    const { pack, unpack } = await import("/chats/archive.js");
    const events = (text, prompt_tokens, tokens, reason = "eos") => [
        { type: "stream.started", seq: 0, stream: "s", prompt_tokens },
        { type: "block.committed", seq: 1, text, stop: tokens, steps: 2, elapsed_ms: 5 },
        {
            type: "stream.finished", seq: 2, reason,
            usage: { completion_tokens: tokens, steps: 2 },
            timings: { total_ms: 10, first_block_ms: 5 },
        },
    ];
    const answered = (parent, question, text, prompt_tokens = 10, tokens = 4) => {
        const turn = newTurn({ chat: "c", parent, question });
        turn.promptChars = 100;
        for (const event of events(text, prompt_tokens, tokens)) apply(turn, event);
        return turn;
    };
    const byId = (...turns) => new Map(turns.map((turn) => [turn.id, turn]));
"""


@pytest.fixture(scope="module")
def page(chromium: Browser) -> Iterator[Page]:
    with ScriptedServer("unused") as server:
        page = chromium.new_page()
        page.goto(server.url + "d2f-client.d.ts")  # any document of the origin
        yield page
        page.close()


def run(page: Page, body: str, given: Any = None) -> Any:
    """Run the body of a function in the page; what it returns."""
    return page.evaluate(PRELUDE + body + "\n}", given)


def test_branches_are_siblings_and_the_newest_is_found(page: Page) -> None:
    found = run(
        page,
        """
        const first = answered(null, "1", "a"), second = answered(first.id, "2", "b");
        const other = answered(null, "1x", "c"), end = answered(other.id, "2x", "d");
        [first, second, other, end].forEach((turn, at) => (turn.createdAt = at));
        const turns = byId(first, second, other, end);
        const asked = (path) => path.map(({ question }) => question).join();
        return {
            path: asked(pathTo(turns, end.id)),
            versions: asked(alternatives(turns, first)),
            leaf: newestLeaf(turns, first).question,
            gone: asked(pathTo(turns, "gone")),
        };
        """,
    )
    assert found == {"path": "1x,2x", "versions": "1,1x", "leaf": "2", "gone": ""}


def test_continued_answer_adds_up(page: Page) -> None:
    found = run(
        page,
        """
        const turn = newTurn({ chat: "c", parent: null, question: "q" });
        const { requestId } = turn;
        events("one ", 10, 4, "length").forEach((event) => apply(turn, event));
        askAgain(turn);
        const asked = messagesFor([turn], turn, " ");
        events("two", 14, 3).forEach((event) => apply(turn, event));
        const { text, progress, reason } = turn;
        const { used } = use([turn], "", { system: "" });
        const isRenamed = turn.requestId !== requestId;
        startOver(turn);
        return { asked, text, progress, reason, used, isRenamed, left: turn.text };
        """,
    )
    assert found["asked"] == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "one "},
    ]
    assert (found["text"], found["reason"], found["left"]) == ("one two", "eos", "")
    assert found["progress"] == {"tokens": 7, "steps": 4, "ms": 20, "firstMs": 5}
    assert found["used"] == 14 + 3
    assert found["isRenamed"]


@pytest.mark.parametrize(
    ("max_len", "asked", "left_out"), [(1000, None, 0), (56, None, 1), (60, 50, 3)]
)
def test_oldest_turns_stay_out_so_that_the_answer_has_room(
    page: Page, max_len: int, asked: int | None, left_out: int
) -> None:
    found = run(
        page,
        """
        const path = [];
        for (const question of ["1", "2", "3"]) {
            path.push(answered(path.at(-1)?.id ?? null, question, "x".repeat(9), 11, 1));
        }
        const turn = newTurn({ chat: "c", parent: path.at(-1).id, question: "4" });
        path.push(turn);
        const model = { max_len: given.maxLen, defaults: { max_new_tokens: 256 } };
        const params = given.asked === null ? {} : { max_new_tokens: given.asked };
        turn.numLeftOut = numToLeaveOut(path, turn, { system: "Be brief.", model, params });
        const messages = messagesFor(path, turn, "Be brief.");
        return { numLeftOut: turn.numLeftOut, roles: messages.map(({ role }) => role[0]).join("") };
        """,
        {"maxLen": max_len, "asked": asked},
    )
    assert found == {"numLeftOut": left_out, "roles": "s" + "ua" * (3 - left_out) + "u"}


def test_chats_survive_their_file_and_what_does_not_belong_is_dropped(page: Page) -> None:
    found = run(
        page,
        """
        const id = "chat-0123456789abcdef";
        const first = answered(null, "1", "a"), second = answered(first.id, "2", "b");
        for (const turn of [first, second]) turn.chat = id;
        const times = { createdAt: 1, updatedAt: 2 };
        const chat = { id, title: "T", ...times, system: "s", params: { seed: 1 } };
        chat.leaf = second.id;
        const turns = byId(first, second);
        const [back] = unpack(pack([{ chat, turns }]));
        const kept = (turn) => [turn.id, turn.parent, turn.question, turn.text, turn.status];
        const content = JSON.parse(pack([{ chat, turns }]));
        const harm = { parent: second.id, reason: "constructor", x: 1 };
        Object.assign(content.chats[0].turns[0], harm);
        content.chats[0].turns[1].progress = "much";
        const [harmed] = unpack(JSON.stringify(content));
        return {
            isSame: JSON.stringify(back.chat) === JSON.stringify(chat),
            turns: [...back.turns.values()].map(kept),
            wanted: [first, second].map(kept),
            harmed: [...harmed.turns.values()].map((turn) =>
                [turn.parent === null, turn.reason, turn.progress.tokens, "x" in turn]),
        };
        """,
    )
    assert found["isSame"]
    assert found["turns"] == found["wanted"]
    assert found["harmed"] == [[True, "cancelled", 4, False], [False, "eos", 0, False]]
