"""d2f-client.js in Chromium: what is said and read, by a server in the page and the real one."""

import pytest

import fakes
from browser.chromium import Page
from browser.client_page import run
from browser.page_server import ScriptedServer

pytestmark = pytest.mark.browser


def test_blocks_text_and_result(page: Page) -> None:
    found = run(
        page,
        """
        const stream = connect(makeServer()).generate("hi");
        const texts = [];
        for await (const block of stream.blocks()) texts.push(block.text);
        const { text, tokenIds, reason, usage } = await stream.result();
        return { texts, whole: stream.text, text, tokenIds, reason, steps: usage.steps };
        """,
    )
    text = "one two three"
    assert found == {
        "texts": ["one ", "two ", "three"],
        "whole": text,
        "text": text,
        "tokenIds": [0, 1, 2],
        "reason": "eos",
        "steps": 3,
    }


def test_message_too_big_fails_its_request_and_no_other(page: Page) -> None:
    found = run(
        page,
        """
        const server = makeServer();
        server.onOperation = (operation, socket) => {
            if (operation.prompt === "big") socket.cut(1009, "too big");
            else server.answer(operation, socket);
        };
        const client = connect(server);
        const small = client.generate("small");
        for await (const event of small) break;
        const big = client.generate("big");
        return { big: await codeOf(big.result()), small: (await small.result()).text };
        """,
    )
    assert found == {"big": "message_too_large", "small": "one two three"}


def test_rejection_reaches_its_request(page: Page) -> None:
    found = run(
        page,
        """
        const server = makeServer();
        server.onOperation = ({ request_id }, socket) => socket.deliver({
            type: "request.rejected", code: "rate_limited", message: "wait", request_id,
            retry_after_s: 3,
        });
        const stream = connect(server).generate("hi");
        const error = await stream.blocks().next().catch((error) => error);
        return [error instanceof D2FError, error.code, error.message, error.retryAfterS];
        """,
    )
    assert found == [True, "rate_limited", "wait", 3]


def test_rejection_without_a_name_is_that_of_the_only_open_request(page: Page) -> None:
    found = run(
        page,
        """
        const server = makeServer();
        server.onOperation = (operation, socket) => {
            if (operation.prompt === "good") return server.answer(operation, socket);
            const message = "Expected `int`, got `str`";
            socket.deliver({ type: "request.rejected", code: "invalid_request", message });
        };
        const client = connect(server);
        const good = client.generate("good");
        for await (const event of good) break;
        const bad = client.generate("bad", { params: { block_size: "8" } });
        return [await codeOf(bad.result()), (await good.result()).text];
        """,
    )
    assert found == ["invalid_request", "one two three"]


def test_unknown_messages_are_skipped(page: Page) -> None:
    text = run(
        page,
        """
        const server = makeServer();
        const greet = server.onOpen;
        server.onOpen = (socket) => {
            socket.deliver({ type: "server.joke", stream: 7 });
            greet(socket);
            socket.deliver({ type: "block.dreamt", stream: "stream-1" });
        };
        return (await connect(server).generate("hi").result()).text;
        """,
    )
    assert text == "one two three"


@pytest.mark.parametrize("way", ["cancel", "signal"])
def test_cancel_names_the_stream_and_again_after_a_cut(page: Page, way: str) -> None:
    operations = run(
        page,
        """
        const server = makeServer();
        let seen;
        const twice = new Promise((resolve) => (seen = resolve));
        server.onOperation = (operation, socket) => {
            if (operation.type === "generate") {
                socket.deliver(server.start(operation.request_id).log[0]);
            } else if (operation.type === "cancel") {
                if (server.sockets.length === 1) socket.cut();
                else seen();
            }
        };
        const abort = new AbortController();
        const stream = connect(server).generate("hi", { signal: abort.signal });
        for await (const event of stream) break;
        if (given === "signal") abort.abort();
        else stream.cancel();
        await twice;
        return server.operations.map(({ type, stream }) => [type, stream ?? null]);
        """,
        way,
    )
    stream = "stream-1"
    assert operations == [["generate", None], ["cancel", stream], ["cancel", stream]]


def test_string_is_a_turn_unless_it_is_raw(page: Page) -> None:
    found = run(
        page,
        """
        const server = makeServer();
        const client = connect(server);
        await client.generate("hi").result();
        await client.generate("hi", { raw: true }).result();
        return server.operations.map(({ prompt, raw }) => [prompt, raw]);
        """,
    )
    assert found == [["hi", False], ["hi", True]]


def test_cancelled_before_it_was_sent_it_is_never_sent(page: Page) -> None:
    found = run(
        page,
        """
        const server = makeServer();
        const client = connect(server);
        const stream = client.generate("hi");
        stream.cancel();
        await client.connect();
        await client.generate("other").result();
        const { reason } = await stream.result();
        return [reason, server.operations.map(({ prompt }) => prompt)];
        """,
    )
    assert found == ["cancelled", ["other"]]


def test_stream_of_an_earlier_page_is_read_on(page: Page) -> None:
    found = run(
        page,
        """
        const server = makeServer();
        const { id: stream } = server.start("request-of-before");
        const resumed = connect(server).resume({
            stream, request_id: "request-of-before", after_seq: 1, text: "one ",
        });
        const texts = [];
        for await (const block of resumed.blocks()) texts.push(block.text);
        return [texts, resumed.text];
        """,
    )
    assert found == [["two ", "three"], "one two three"]


def test_slow_reader_misses_drafts_and_nothing_else(page: Page) -> None:
    found = run(
        page,
        """
        const server = makeServer();
        server.onOperation = (operation, socket) => {
            const { id: stream, log } = server.start(operation.request_id);
            for (const event of log) {
                socket.deliver(event);
                for (let number = 0; number < 300; number += 1) {
                    const draft = { index: number, text: "", filled: [], texts: [] };
                    socket.deliver({ type: "block.draft", stream, ...draft });
                }
            }
        };
        const stream = connect(server).generate("hi", { drafts: true });
        const reading = stream[Symbol.asyncIterator]();
        await reading.next();
        await stream.result();
        const seqs = [], again = [];
        let drafts = 0;
        for await (const { type, seq } of reading) {
            if (type === "block.draft") drafts += 1;
            else seqs.push(seq);
        }
        for await (const event of stream) again.push(event.seq);
        return { seqs, drafts, again };
        """,
    )
    assert found == {"seqs": [1, 2, 3, 4], "drafts": 256, "again": [0, 1, 2, 3, 4]}


def test_request_ids_are_unguessable_also_without_random_uuid(page: Page) -> None:
    found = run(
        page,
        """
        const ids = [newRequestId()];
        const original = crypto.randomUUID;
        crypto.randomUUID = undefined;
        ids.push(newRequestId(), newRequestId());
        crypto.randomUUID = original;
        return ids;
        """,
    )
    assert len(set(found)) == 3
    assert all(len(name) >= 32 for name in found)


def test_closed_client_says_so(page: Page) -> None:
    found = run(
        page,
        """
        const client = connect(makeServer());
        const running = client.generate("hi");
        client.close();
        let refused;
        try { client.generate("hi"); } catch (error) { refused = error.message; }
        return [await codeOf(running.result()), refused, await codeOf(client.connect())];
        """,
    )
    assert found == ["connection_lost", "the client was closed", "connection_lost"]


def test_answers_of_the_scripted_model_match_the_sdk(page: Page) -> None:
    with ScriptedServer(is_held=False) as server:
        page.goto(server.url + "d2f-client.d.ts")
        text = page.evaluate(
            """async (url) => {
                const { D2FClient } = await import("/d2f-client.js");
                const client = new D2FClient({ url });
                const { text } = await client.generate("hi").result();
                client.close();
                return text;
            }""",
            server.url.replace("http", "ws") + "v1/stream",
        )
    assert text == fakes.ANSWER
