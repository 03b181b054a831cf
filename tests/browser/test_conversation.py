"""d2f-client.js follows the table of cases that the Python client follows."""

from collections.abc import Iterator
from typing import Any

import pytest

from browser.chromium import Browser, Page
from browser.page_server import ScriptedServer
from conversation_cases import CASES

pytestmark = pytest.mark.browser

RUN = """async (steps) => {
    const { D2FClient } = await import("/d2f-client.js");
    const sockets = [];
    let said = [];
    class FakeSocket {
        constructor() {
            sockets.push(this);
        }
        send(data) {
            const operation = JSON.parse(data);
            if (operation.type !== "authenticate") said.push(operation);
        }
        close() {}
    }
    const turn = () => new Promise((resolve) => setTimeout(resolve));
    const holds = (found, wanted) =>
        Object.entries(wanted).every(([name, value]) => found[name] === value);
    const client = new D2FClient({
        url: "ws://fake", WebSocket: FakeSocket, times: { baseMs: 0, maxMs: 0 },
    });
    client.connect().catch(() => {});
    const streams = {}, outcomes = {};
    let open = null;
    for (const [number, step] of steps.entries()) {
        const [kind] = Object.keys(step);
        const given = step[kind];
        const expect = (isIt, found) => {
            if (!isIt) throw new Error(`step ${number}: found ${JSON.stringify(found)}`);
        };
        switch (kind) {
            case "ask": {
                const options = { requestId: given, drafts: step.drafts ?? false };
                const stream = (streams[given] = client.generate(step.prompt ?? "hi", options));
                outcomes[given] = null;
                stream.result().then(
                    ({ reason }) => (outcomes[given] = reason),
                    ({ code }) => (outcomes[given] = code),
                );
                break;
            }
            case "cancel":
                streams[given].cancel();
                break;
            case "opened": {
                while (sockets.at(-1) === open) await turn();
                open = sockets.at(-1);
                open.onopen?.();
                const hello = { type: "server.hello", protocol: 1, model: {}, resume_ttl_s: 60 };
                open.onmessage({ data: JSON.stringify(hello) });
                break;
            }
            case "closed":
                open.onclose({ code: given, reason: "" });
                break;
            case "receive":
                open.onmessage({ data: JSON.stringify(given) });
                break;
            case "sends": {
                const isIt = (operation, at) => holds(operation, given[at]);
                expect(said.length === given.length && said.every(isIt), said);
                said = [];
                break;
            }
            case "tells": {
                await turn();
                const found = {};
                for (const name of Object.keys(given))
                    found[name] = [outcomes[name], streams[name].text];
                expect(JSON.stringify(found) === JSON.stringify(given), found);
                break;
            }
            default:
                throw new Error(`there is no step ${kind}`);
        }
    }
    client.close();
}"""


@pytest.fixture(scope="module")
def page(chromium: Browser) -> Iterator[Page]:
    with ScriptedServer("unused") as server:
        page = chromium.new_page()
        page.goto(server.url + "d2f-client.d.ts")  # any document of the origin
        yield page
        page.close()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_case(page: Page, case: dict[str, Any]) -> None:
    page.evaluate(RUN, case["steps"])
