"""A small hub on loopback: one repository as huggingface_hub asks for it, which may fail."""

import functools
import http.server
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

COMMIT: Final = "0123456789abcdef0123456789abcdef01234567"
REPO: Final = "org/tiny-dream"


@dataclass
class LocalHub:
    """What a hub has, and how it answers.

    Attributes:
        folder: the files of REPO.
        fetched: names of its files that were fetched, in order; with "@START" from the middle on.
        cut: of these, the first half comes once, then the connection breaks.
        failing: these cannot be had.
        interrupting: while one of these is fetched, this process gets a SIGINT; it never comes.
        refused: statuses and error codes of other repositories; those not named do not exist.
    """

    folder: Path
    fetched: list[str] = field(default_factory=list)
    cut: set[str] = field(default_factory=set)
    failing: set[str] = field(default_factory=set)
    interrupting: set[str] = field(default_factory=set)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    closing: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def online(self, cache: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
        """Let huggingface_hub reach it, with an empty cache."""
        constants = pytest.importorskip("huggingface_hub.constants")
        handler = functools.partial(_Handler, self)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield
        self.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    def __init__(self, hub: LocalHub, *args: object) -> None:
        self.hub = hub
        super().__init__(*args)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == f"/api/models/{REPO}/revision/main":
            self.answer(json.dumps({"id": REPO, "sha": COMMIT, "siblings": []}).encode())
        elif path == f"/api/models/{REPO}/tree/{COMMIT}":
            self.answer(json.dumps(self.tree()).encode())
        elif path.startswith(f"/{REPO}/resolve/{COMMIT}/"):
            self.give(path.partition(f"/{COMMIT}/")[2])
        else:
            repo = "/".join(path.removeprefix("/api/models/").split("/")[:2])
            missing = 404, "RevisionNotFound" if repo == REPO else "RepoNotFound"
            status, code = self.hub.refused.get(repo, missing)
            self.answer(b"{}", status=status, error=code)

    def tree(self) -> list[dict[str, str | int]]:
        root = self.hub.folder
        return [
            {
                "type": "file",
                "path": file.relative_to(root).as_posix(),
                "size": file.stat().st_size,
                "oid": "ab" * 20,
            }
            for file in sorted(root.rglob("*"))
            if file.is_file()
        ]

    def give(self, name: str) -> None:
        body = (self.hub.folder / name).read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if self.command == "GET":
            if name in self.hub.failing:
                return self.answer(b"", status=500)
            self.hub.fetched.append(f"{name}@{start}" if start else name)
            if name in self.hub.interrupting:
                main = threading.main_thread().ident
                assert main is not None
                signal.pthread_kill(main, signal.SIGINT)
                self.hub.closing.wait()
        self.answer(body[start:], name, 206 if start else 200)

    def answer(self, body: bytes, name: str = "", status: int = 200, error: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{name}"')
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET" and name in self.hub.cut:
            self.hub.cut.remove(name)
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass
