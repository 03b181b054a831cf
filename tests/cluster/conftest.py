from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from requirements import require_module
from stores import ValkeyServer


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    server = ValkeyServer(tmp_path_factory.mktemp("store"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[Callable[..., ValkeyServer]]:
    """Makes servers of the test's own, which it starts, kills and restarts."""
    require_module("valkey")
    servers: list[ValkeyServer] = []

    def make(*, lines: Sequence[str] = ()) -> ValkeyServer:
        folder = tmp_path / f"store-{len(servers)}"
        folder.mkdir()
        servers.append(ValkeyServer(folder, lines=lines))
        return servers[-1]

    yield make
    for server in servers:
        server.kill()
