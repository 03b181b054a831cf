"""The table of cases that every client's conversation follows, with its messages written out."""

import json
from pathlib import Path
from typing import Any

__all__ = ["CASES"]

TEMPLATES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "started": (
        "stream.started",
        ("request_id", "stream"),
        {"seq": 0, "model": "m", "block_size": 4, "prompt_tokens": 1},
    ),
    "block": (
        "block.committed",
        ("stream", "seq", "text"),
        {"index": 0, "start": 0, "stop": 4, "token_ids": [7], "steps": 1, "elapsed_ms": 1.0},
    ),
    "draft": ("block.draft", ("stream", "text"), {"index": 0}),
    "finished": (
        "stream.finished",
        ("stream", "seq", "reason"),
        {
            "text_length": 0,
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "steps": 1},
            "timings": {"first_block_ms": None, "total_ms": 1.0},
        },
    ),
    "failed": ("stream.failed", ("stream", "seq", "code"), {"message": "failed"}),
}


def message_of(kind: str, given: Any) -> dict[str, Any]:
    """The whole message that a step stands for."""
    if kind == "receive":
        return dict(given)
    if kind == "rejected":
        return {"type": "request.rejected", "message": "refused", **given}
    tag, names, rest = TEMPLATES[kind]
    return {"type": tag, **dict(zip(names, given, strict=True)), **rest}


def case_of(stored: dict[str, Any]) -> dict[str, Any]:
    """A case of the table; what comes from the server is in steps called `receive`."""
    steps = []
    for step in stored["steps"]:
        kind = next(iter(step))
        is_message = kind in TEMPLATES or kind in ("receive", "rejected")
        steps.append({"receive": message_of(kind, step[kind])} if is_message else step)
    return {"name": stored["name"], "steps": steps}


TABLE = Path(__file__).parent / "sdk" / "conversation_cases.json"
CASES = [case_of(stored) for stored in json.loads(TABLE.read_text())["cases"]]
