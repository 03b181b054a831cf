"""Functions that a page runs against d2f-client.js, beside a server that breaks at will."""

from pathlib import Path
from typing import Any

from browser.chromium import Page

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


def run(page: Page, body: str, given: Any = None) -> Any:
    """Run the body of a function in the page; what it returns."""
    return page.evaluate(PRELUDE + body + "\n}", given)
