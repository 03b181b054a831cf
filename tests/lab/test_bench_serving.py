"""The serving benchmark in small: it checks every answer itself and raises where one is wrong."""

import pytest

from lab.bench import serving, serving_hostile


async def test_parts_check_what_they_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "NUM_CONNECTIONS": 4,
        "STREAMS_EACH": 2,
        "NUM_DISCONNECTS": 10,
        "NUM_STREAMS": 500,
    }
    for name, value in small.items():
        monkeypatch.setattr(serving, name, value)
    monkeypatch.setattr(serving_hostile, "NUM_HOSTILE", 100)
    monkeypatch.setattr(serving_hostile, "NUM_SLOW", 2)
    parts = ("concurrent_streams", "disconnects", "memory", "hostile")
    results = await serving.serving(parts)
    assert results["concurrent_streams"]["streams"] == 8
    assert results["disconnects"]["disconnects"] >= 10
    for part in ("memory", "hostile"):
        assert results[part]["leaked_tasks"] == 0
