"""Streamers that note what they are told."""

import threading
from typing import Any


class Recorder:
    """Notes its calls, and that never two run at once."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self._lock = threading.Lock()

    def put(self, value: Any) -> None:
        self._note("put", value.tolist())

    def end(self) -> None:
        self._note("end", None)

    def _note(self, name: str, value: Any) -> None:
        assert self._lock.acquire(blocking=False)
        self.calls.append((name, value))
        self._lock.release()


class Bytes:
    """A tokenizer whose tokens are the scripted backend's: the bytes of the text."""

    def decode(self, ids: Any, **_: Any) -> str:
        return bytes(int(i) for i in ids if int(i) < 256).decode(errors="replace")

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return list(text.encode())


class DraftRecorder(Recorder):
    tokenizer = Bytes()

    def put_draft(self, value: Any, **_: Any) -> None:
        self._note("draft", self.tokenizer.decode(value.tolist()))
