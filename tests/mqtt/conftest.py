import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import pytest
import pytest_asyncio

from brokers import Mosquitto


@pytest.fixture(scope="module")
def mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    broker = Mosquitto(tmp_path_factory.mktemp("mosquitto"))
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def make_broker(tmp_path: Path) -> Iterator[Callable[..., Mosquitto]]:
    """Makes brokers of the test's own, which it starts, kills and restarts."""
    brokers: list[Mosquitto] = []

    def make(*, lines: Sequence[str] = ("allow_anonymous true",)) -> Mosquitto:
        folder = tmp_path / f"broker-{len(brokers)}"
        folder.mkdir()
        brokers.append(Mosquitto(folder, lines=lines))
        return brokers[-1]

    yield make
    for broker in brokers:
        broker.kill()


@pytest_asyncio.fixture
async def nothing_left() -> AsyncIterator[None]:
    """Checks that a test leaves no task behind."""
    before = asyncio.all_tasks()
    yield
    for _ in range(3):
        await asyncio.sleep(0)  # tasks that were cancelled last end now
    assert asyncio.all_tasks() - before - {asyncio.current_task()} == set()
