import asyncio

import pytest

from d2f_stream.client.mqtt_nodes import Nodes
from d2f_stream.wire.protocol import ModelCard, ModelDefaults, ServerHello
from d2f_stream.wire.topics import NodeStatus
from fakes import turn
from stalls import stall

HELLO = ServerHello(
    protocol=1,
    model=ModelCard(
        name="model",
        family="scripted",
        native_block_size=8,
        max_block_size=8,
        max_len=64,
        defaults=ModelDefaults(),
    ),
    resume_ttl_s=1.0,
)


class Watcher:
    """Notes what is told of the nodes."""

    def __init__(self) -> None:
        self.news: list[tuple[str, bool] | str] = []
        self.told = asyncio.Event()
        self.nodes = Nodes(on_online=self._online, on_offline=self._offline)

    def _online(self, node: str, requests_lost: bool) -> None:
        self.news.append((node, requests_lost))

    def _offline(self, node: str) -> None:
        self.news.append(node)
        self.told.set()


def online(node: str, connection: int = 1, ttl_s: float = 90.0) -> NodeStatus:
    return NodeStatus(node=node, status="online", connection=connection, ttl_s=ttl_s, hello=HELLO)


def offline(node: str) -> NodeStatus:
    return NodeStatus(node=node, status="offline")


async def test_first_worker_may_have_missed_requests_and_a_further_one_has_not() -> None:
    watcher = Watcher()
    watcher.nodes.note(online("a"))
    watcher.nodes.note(online("b"))
    watcher.nodes.note(online("a"))
    assert watcher.news == [("a", True), ("b", False)]


async def test_worker_that_connected_again_may_have_missed_requests() -> None:
    watcher = Watcher()
    watcher.nodes.note(online("a"))
    watcher.nodes.note(online("a", connection=2))
    assert watcher.news == [("a", True), ("a", True)]


async def test_loss_is_told_once() -> None:
    watcher = Watcher()
    watcher.nodes.note(online("a"))
    watcher.nodes.note(offline("a"))
    watcher.nodes.note(offline("a"))
    assert watcher.news == [("a", True), "a"]
    assert watcher.nodes.is_gone("a")
    assert watcher.nodes.card is None


@pytest.mark.parametrize("status", ["closing", "offline"])
async def test_requests_go_only_where_a_worker_takes_them(status: str) -> None:
    watcher = Watcher()
    watcher.nodes.note(online("a"))
    assert watcher.nodes.card == HELLO.model
    watcher.nodes.note(
        NodeStatus(node="a", status=status, connection=1, hello=HELLO)  # type: ignore[arg-type]
    )
    assert watcher.nodes.card is None


async def test_silent_worker_is_gone_once_its_time_is_over() -> None:
    watcher = Watcher()
    watcher.nodes.listen()
    watcher.nodes.note(online("a", ttl_s=0.01))
    await watcher.told.wait()
    assert watcher.nodes.is_gone("a")
    watcher.nodes.pause()


async def test_worker_is_heard_after_a_stall_of_the_client() -> None:
    watcher = Watcher()
    watcher.nodes.listen()
    watcher.nodes.note(online("a"))
    stall()
    await turn()
    watcher.nodes.note(online("a"))
    assert watcher.news == [("a", True)]
    watcher.nodes.pause()


async def test_silence_means_nothing_while_there_is_no_connection() -> None:
    watcher = Watcher()
    watcher.nodes.listen()
    watcher.nodes.note(online("a", ttl_s=0.0))
    watcher.nodes.pause()
    watcher.nodes.note(online("b", ttl_s=0.0))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not watcher.told.is_set()
    watcher.nodes.listen()
    await watcher.told.wait()


async def test_workers_that_are_gone_are_forgotten_in_the_end() -> None:
    watcher = Watcher()
    for number in range(300):
        watcher.nodes.note(offline(f"node-{number}"))
    assert not watcher.nodes.is_gone("node-0")
    assert watcher.nodes.is_gone("node-299")


async def test_worker_that_was_never_heard_of_is_awaited() -> None:
    watcher = Watcher()
    watcher.nodes.expect("a")
    assert not watcher.nodes.is_gone("a")
    assert watcher.nodes.card is None
    watcher.nodes.note(offline("a"))
    assert watcher.news == ["a"]
