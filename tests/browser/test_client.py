"""d2f-client.js in Chromium: against a server in the page that breaks at will, and the real one."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import fakes
from browser.chromium import Browser, Page, expect
from browser.page_server import ScriptedServer
from d2f_stream.server.auth import Auth

pytestmark = pytest.mark.browser

EXAMPLES = Path(__file__).parents[2] / "examples"
FAKE_SERVER = (Path(__file__).parent / "fake_server.js").read_text()
PRELUDE = f"""async (given) => {{
    const {{ D2FClient, D2FError, newRequestId }} = await import("/d2f-client.js");
    const makeServer = ({FAKE_SERVER[FAKE_SERVER.index("({ blocks") :]});
    const fast = {{ baseMs: 0, maxMs: 0 }};
    const fakeUrl = "ws://fake/v1/stream";
    const connect = ({{ WebSocket }}, times = fast, more = {{}}) =>
        new D2FClient({{ url: fakeUrl, WebSocket, times, ...more }});
    const until = (target, name, isIt) => new Promise((resolve) => {{
        target.addEventListener(name, ({{ detail }}) => isIt(detail) && resolve());
    }});
    const codeOf = (promise) => promise.then(() => "none", (error) => error.code);
    const random = (seed) => () => {{  // mulberry32, by Tommy Ettinger
        seed = (seed + 0x6d2b79f5) | 0;
        let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
        t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
        return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    }};
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer("0123456789" * 12) as server:
        yield server


@pytest.fixture(scope="module")
def page(chromium: Browser, server: ScriptedServer) -> Iterator[Page]:
    page = chromium.new_page()
    page.goto(server.url + "d2f-client.d.ts")  # any document of the origin
    yield page
    page.close()


def run(page: Page, body: str, given: Any = None) -> Any:
    """Run the body of a function in the page; what it returns."""
    return page.evaluate(PRELUDE + body + "\n}", given)


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


@pytest.mark.parametrize("seed", range(3))
def test_texts_stay_exact_over_hundreds_of_random_cuts(page: Page, seed: int) -> None:
    found = run(
        page,
        """
        const blocks = Array.from({ length: 40 }, (_, number) => `[${number}]`);
        const server = makeServer({ blocks, cutShare: 0.15, random: random(given) });
        const client = connect(server);
        const streams = Array.from({ length: 8 }, () => client.generate("hi"));
        const readAll = async (stream) => {
            const seqs = [];
            for await (const event of stream) seqs.push(event.seq);
            return { seqs, text: (await stream.result()).text };
        };
        const answers = await Promise.all(streams.map(readAll));
        client.close();
        const { numCuts, numStarted } = server;
        return { answers, numCuts, numStarted };
        """,
        seed,
    )
    text = "".join(f"[{number}]" for number in range(40))
    assert found["answers"] == [{"seqs": list(range(42)), "text": text}] * 8
    assert found["numStarted"] == 8
    assert found["numCuts"] >= 100


def test_text_stays_exact_over_a_hundred_cuts_of_the_real_server(
    page: Page, server: ScriptedServer
) -> None:
    page.evaluate(
        """async (url) => {
            const { D2FClient } = await import("/d2f-client.js");
            window.client = new D2FClient({ url, times: { baseMs: 1, maxMs: 1 } });
            window.answer = client.generate("count", { drafts: true });
            window.opened = 0;
            client.addEventListener("hello", () => (window.opened += 1));
            await client.connect();
        }""",
        server.url.replace("http", "ws") + "v1/stream",
    )
    for number in range(1, 101):
        server.sever()
        server.gate.let_through(1)
        page.wait_for_function("number => opened > number", arg=number)
    server.gate.open()
    assert page.evaluate("answer.result().then(({ text }) => text)") == "0123456789" * 12
    page.evaluate("client.close()")
    assert server.num_streams == 1


def test_repeated_events_are_dropped_and_missing_ones_asked_for(page: Page) -> None:
    found = run(
        page,
        """
        const server = makeServer();
        server.onOperation = (operation, socket) => {
            if (operation.type !== "generate") return server.answer(operation, socket);
            const { log } = server.start(operation.request_id);
            for (const seq of [0, 1, 1, 0, 3]) socket.deliver(log[seq]);
        };
        const { text } = await connect(server).generate("hi").result();
        return { text, operations: server.operations.slice(1) };
        """,
    )
    assert found["text"] == "one two three"
    resume = {"type": "resume", "stream": "stream-1", "after_seq": 1, "drafts": False}
    assert found["operations"] == [resume]


def test_unstarted_request_is_sent_again_under_its_name(page: Page) -> None:
    found = run(
        page,
        """
        const server = makeServer();
        server.onOperation = (operation, socket) => {
            if (server.sockets.length === 1) socket.cut();
            else server.answer(operation, socket);
        };
        await connect(server).generate("hi").result();
        return server.operations.map(({ type, request_id }) => [type, request_id]);
        """,
    )
    assert found[0] == found[1]
    assert found[0][0] == "generate"


def test_lost_stream_fails_with_its_code(page: Page) -> None:
    found = run(
        page,
        """
        const server = makeServer();
        server.onOperation = (operation, socket) => {
            if (operation.type === "resume") return server.answer(operation, socket);
            const { log } = server.start(operation.request_id);
            socket.deliver(log[0]);
            socket.deliver(log[1]);
            socket.next(() => { server.streams.clear(); socket.cut(); });
        };
        const stream = connect(server).generate("hi");
        const events = [];
        for await (const event of stream) events.push(event.type);
        return { events, code: await codeOf(stream.result()), text: stream.text };
        """,
    )
    assert found["events"] == ["stream.started", "block.committed", "stream.failed"]
    assert found["code"] == "stream_lost"
    assert found["text"] == "one "


def test_waits_grow_up_to_a_bound_with_jitter(page: Page) -> None:
    waits = run(
        page,
        """
        const server = makeServer();
        server.onOpen = (socket) => socket.cut();
        const client = connect(server, { baseMs: 2, maxMs: 16 });
        client.connect().catch(() => {});
        const waits = [];
        await until(client, "state", ({ retryInMs }) => {
            if (retryInMs !== null) waits.push(retryInMs);
            return waits.length === 12;
        });
        client.close();
        return waits;
        """,
    )
    bounds = [2, 4, 8] + [16] * 9
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, bounds, strict=True))
    assert len(set(waits[3:])) > 1


def test_gives_up_with_a_clear_error_and_can_begin_again(page: Page) -> None:
    found = run(
        page,
        """
        const server = makeServer();
        const greet = server.onOpen;
        server.onOpen = (socket) => socket.cut();
        const client = connect(server, { ...fast, giveUpMs: 0 });
        const stream = client.generate("hi");
        const error = await stream.result().catch((error) => error);
        const { state } = client;
        server.onOpen = greet;
        const { text } = await client.generate("hi").result();
        return { code: error.code, message: error.message, state, text };
        """,
    )
    assert found["code"] == "connection_lost"
    assert "could not be reached" in found["message"]
    assert found["state"] == "closed"
    assert found["text"] == "one two three"


def test_network_that_is_back_is_tried_at_once(page: Page) -> None:
    text = run(
        page,
        """
        const server = makeServer();
        const greet = server.onOpen;
        server.onOpen = (socket) => socket.cut();
        const client = connect(server, { baseMs: 1e9, maxMs: 1e9, giveUpMs: 1e12 });
        const answer = client.generate("hi").result();
        await until(client, "state", ({ retryInMs }) => retryInMs !== null);
        server.onOpen = greet;
        window.dispatchEvent(new Event("online"));
        const { text } = await answer;
        client.close();
        return text;
        """,
    )
    assert text == "one two three"


def test_connection_that_died_silently_is_replaced_when_the_network_is_back(page: Page) -> None:
    found = run(
        page,
        """
        const server = makeServer();
        server.onOperation = (operation, socket) => {
            if (operation.type === "resume") return server.answer(operation, socket);
            socket.deliver(server.start(operation.request_id).log[0]); // and nothing more
        };
        const client = connect(server);
        const stream = client.generate("hi");
        for await (const event of stream) break;
        window.dispatchEvent(new Event("online"));
        const { text } = await stream.result();
        client.close();
        return { text, connections: server.sockets.length };
        """,
    )
    assert found == {"text": "one two three", "connections": 2}


def test_token_travels_as_a_subprotocol_and_a_wrong_one_ends_it(page: Page) -> None:
    found = run(
        page,
        """
        const server = makeServer();
        server.onOpen = (socket) => socket.cut(4401, "the token is wrong");
        const client = connect(server, fast, { token: "a token?>ü" });
        const code = await codeOf(client.generate("hi").result());
        const { url, protocols } = server.socket;
        return { code, state: client.state, url, protocols, tries: server.sockets.length };
        """,
    )
    assert found == {
        "code": "unauthorized",
        "state": "closed",
        "url": "ws://fake/v1/stream",
        "protocols": ["d2f.v1.json", "d2f.auth.YSB0b2tlbj8-w7w"],
        "tries": 1,
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


@pytest.fixture
def examples_url() -> Iterator[str]:
    """The address of the examples, as `python -m http.server` serves them."""
    handler = partial(QuietHandler, directory=EXAMPLES)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_example_streams_from_a_page_of_another_origin(
    chromium: Browser, examples_url: str
) -> None:
    with ScriptedServer(is_held=False, auth=Auth(origins=(examples_url,))) as server:
        page = chromium.new_page()
        page.goto(f"{examples_url}/browser.html?server={server.url.rstrip('/')}")
        page.get_by_role("button", name="Ask").click()
        expect(page.locator("#answer")).to_have_text(fakes.ANSWER)
        expect(page.locator("#state")).to_have_text("open")
        page.close()


def test_example_is_short() -> None:
    assert len((EXAMPLES / "browser.html").read_text(encoding="utf-8").splitlines()) <= 60
