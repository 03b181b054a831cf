"""d2f-client.js in Chromium: connections that break, go silent, or are refused."""

import pytest

from browser.chromium import Page
from browser.client_page import run
from browser.page_server import ScriptedServer

pytestmark = pytest.mark.browser


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
