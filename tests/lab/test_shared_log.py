"""The benchmark of a shared log runs, and checks each event that it times."""

from pathlib import Path

import pytest

from stores import ValkeyServer


async def test_it_times_events_and_cancels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ValkeyServer(tmp_path)
    from lab.bench import shared_log

    monkeypatch.setattr(shared_log, "NUM_CANCELS", 3)
    store.start()
    try:
        figures = await shared_log.shared_log(store.url, numbers=[2])
    finally:
        store.kill()
    assert 0 < figures["cancel"]["p50"] <= figures["cancel"]["max"]
    assert figures["streams"][2]["events_per_s"] > 0
