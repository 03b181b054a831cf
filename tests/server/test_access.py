"""Who may connect, and what one client can do to another's streams: nothing."""

import asyncio
import base64
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus

from d2f_stream.server.auth import Auth
from d2f_stream.wire.codec import JSON, MSGPACK
from d2f_stream.wire.protocol import Authenticate, Cancel
from fakes import held
from serving import ALICE, BOB, TWO_CLIENTS, Peer, check_whole, request, serving


def as_subprotocol(token: str) -> str:
    return "d2f.auth." + base64.urlsafe_b64encode(token.encode()).decode().rstrip("=")


async def test_token_comes_in_the_header() -> None:
    async with serving(auth=TWO_CLIENTS) as server, Peer.to(server, token=ALICE) as peer:
        await peer.hello()
        await peer.send(request())
        check_whole(await peer.answer())


async def test_token_comes_as_a_subprotocol_that_is_not_echoed() -> None:
    names = [as_subprotocol(ALICE), JSON.subprotocol]
    async with serving(auth=TWO_CLIENTS) as server, Peer.to(server, subprotocols=names) as peer:
        assert peer.socket.subprotocol == JSON.subprotocol
        await peer.hello()


async def test_token_alone_as_a_subprotocol_means_json_and_is_not_echoed() -> None:
    names = [as_subprotocol(ALICE)]
    async with serving(auth=TWO_CLIENTS) as server, Peer.to(server, subprotocols=names) as peer:
        assert peer.socket.subprotocol is None
        await peer.hello()


async def test_token_comes_in_the_first_message() -> None:
    async with serving(auth=TWO_CLIENTS) as server, Peer.to(server, codec=MSGPACK) as peer:
        await peer.send(Authenticate(token=ALICE))
        await peer.hello()


@pytest.mark.parametrize(
    "options",
    [
        {"token": "alice-0123456789abcdeX"},
        {"subprotocols": [as_subprotocol("wrong-wrong-wrong-wrong"), JSON.subprotocol]},
        {"subprotocols": ["d2f.auth.!!!", JSON.subprotocol]},
    ],
)
async def test_wrong_token_is_closed_with_4401(options: dict[str, Any]) -> None:
    async with serving(auth=TWO_CLIENTS) as server, Peer.to(server, **options) as peer:
        if "d2f.auth.!!!" in options.get("subprotocols", ()):  # no token at all
            await peer.send(Authenticate(token="wrong"))
        code, reason = await peer.closed()
    assert (code, reason) == (4401, "the token is wrong")


@pytest.mark.parametrize("first", [Authenticate(token="wrong"), request()])
async def test_first_message_must_bring_the_token(first: Any) -> None:
    async with serving(auth=TWO_CLIENTS) as server, Peer.to(server) as peer:
        await peer.send(first)
        assert (await peer.closed())[0] == 4401
        assert server.registry.num_retained == 0


@pytest.mark.parametrize("name", ["token", "access_token", "key", "API_KEY"])
async def test_token_in_the_query_string_is_refused_even_if_it_is_right(name: str) -> None:
    query = f"?{name}={ALICE}"
    async with (
        serving(auth=TWO_CLIENTS) as server,
        Peer.to(server, token=ALICE, query=query) as peer,
    ):
        code, reason = await peer.closed()
    assert code == 4401
    assert "query string" in reason


async def test_unknown_subprotocols_only_are_refused() -> None:
    async with serving() as server:
        with pytest.raises(InvalidStatus) as caught:
            async with Peer.to(server, subprotocols=["mqtt", "d2f.v9.json"]):
                pass
    assert caught.value.response.status_code == 400
    assert b"d2f.v1.json" in caught.value.response.body


@pytest.mark.parametrize(
    ("auth", "origin", "status"),
    [
        (Auth(), "https://evil.example", 403),
        (Auth(), "null", 403),
        (TWO_CLIENTS, "https://evil.example", 403),
        (Auth(origins=("https://chat.example",)), "https://evil.example", 403),
        (Auth(origins=("https://chat.example",)), "https://chat.example", 101),
        (Auth(origins=("*",)), "https://any.example", 101),
        (Auth(), None, 101),
    ],
)
async def test_pages_of_foreign_origins_are_refused(
    auth: Auth, origin: str | None, status: int
) -> None:
    async with serving(auth=auth) as server:
        got = 101
        try:
            async with Peer.to(server, origin=origin):
                pass
        except InvalidStatus as error:
            got = error.response.status_code
    assert got == status


async def test_page_of_the_server_itself_is_let_in() -> None:
    async with serving() as server:
        own = f"http://127.0.0.1:{server.port}"
        async with Peer.to(server, origin=own) as peer:
            await peer.hello()


async def test_foreign_name_of_this_machine_is_refused() -> None:
    # A page of evil.example, whose name is made to point to 127.0.0.1, is of its "own" origin.
    async with serving() as server:
        status = await raw_status(server.port, host="evil.example", origin="http://evil.example")
    assert status == 403


async def test_name_that_a_container_has_for_this_machine_can_be_allowed() -> None:
    async with serving(allowed_hosts=("host.docker.internal",)) as server:
        name = f"host.docker.internal:{server.port}"
        status = await raw_status(server.port, host=name, origin=f"http://{name}")
        other = await raw_status(server.port, host="evil.example", origin="http://evil.example")
    assert (status, other) == (101, 403)


async def test_client_cannot_read_cancel_or_resume_anothers_stream() -> None:
    backend, gate = held()
    async with (
        serving(backend, auth=TWO_CLIENTS) as server,
        Peer.to(server, token=ALICE) as alice,
        Peer.to(server, token=BOB) as bob,
    ):
        await alice.hello()
        await bob.hello()
        asked = request()
        await alice.send(asked)
        stream = (await alice.started()).stream
        await bob.resume(stream)
        assert (await bob.rejected()).code == "stream_lost"
        await bob.cancel(stream)
        assert (await bob.rejected()).code == "stream_lost"
        await bob.send(Cancel(request_id=asked.request_id))
        assert (await bob.rejected()).code == "stream_lost"
        await bob.send(asked)  # the same name is another client's own request
        gate.open()
        check_whole(await bob.answer())
        log = await alice.answer()
        assert log[-1].reason == "eos"  # type: ignore[union-attr]
        assert {event.stream for event in log} == {stream}
    assert backend.num_opened == 2


async def raw_status(port: int, *, host: str, origin: str) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [
        "GET /v1/stream HTTP/1.1",
        f"Host: {host}",
        f"Origin: {origin}",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: " + base64.b64encode(b"0123456789abcdef").decode(),
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    line = await reader.readline()
    writer.close()
    await writer.wait_closed()
    return int(line.split()[1])
