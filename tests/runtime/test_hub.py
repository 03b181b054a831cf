"""Hub ids: what is fetched from a small hub on loopback, what is said where nothing can be."""

import functools
import http.server
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import d2f_stream
from d2f_runtime.models.hub import HubModel, fetch_description, fetch_weights, locate
from d2f_stream.core.errors import MissingExtra, ModelNotFound, UnsupportedModel
from tiny_checkpoints import write_model

pytest.importorskip("transformers")
constants = pytest.importorskip("huggingface_hub.constants")
pytestmark = pytest.mark.torch

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "org/tiny-dream"


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves the files of one repository as the hub does, and notes which were fetched."""

    folder: Path
    fetched: list[str]

    def __init__(self, folder: Path, fetched: list[str], *args: object) -> None:
        self.folder, self.fetched = folder, fetched
        super().__init__(*args)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        files = [p for p in sorted(self.folder.rglob("*")) if p.is_file()]
        if path == f"/api/models/{REPO}/revision/main":
            self.answer(json.dumps({"id": REPO, "sha": COMMIT, "siblings": []}).encode())
        elif path == f"/api/models/{REPO}/tree/{COMMIT}":
            tree = [
                {
                    "type": "file",
                    "path": file.relative_to(self.folder).as_posix(),
                    "size": file.stat().st_size,
                    "oid": "ab" * 20,
                }
                for file in files
            ]
            self.answer(json.dumps(tree).encode())
        elif path.startswith(f"/{REPO}/resolve/{COMMIT}/"):
            name = path.partition(f"/{COMMIT}/")[2]
            if self.command == "GET":
                self.fetched.append(name)
            self.answer((self.folder / name).read_bytes(), name)
        else:
            code = "RevisionNotFound" if REPO in path else "RepoNotFound"
            self.answer(b"{}", status=404, error=code)

    def answer(self, body: bytes, name: str = "", status: int = 200, error: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{name}"')
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; nothing is online."""
    path = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return path


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    write_model(folder, "Dream", num_shards=2)
    for name in ("modeling_dream.py", "pytorch_model.bin", "original/model.safetensors", "a.onnx"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"never fetched")
    return folder


@pytest.fixture
def fetched(repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The hub is online; returns what is fetched from it, in order."""
    names: list[str] = []
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Hub, repository, names)
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield names
    server.shutdown()
    thread.join()
    server.server_close()


def fill_cache(cache: Path, repository: Path) -> None:
    """Lay the repository out as an earlier download has left it."""
    root = cache / "models--org--tiny-dream"
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    for file in repository.iterdir():
        if file.suffix in (".json", ".txt", ".safetensors"):
            (snapshot / file.name).write_bytes(file.read_bytes())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubModel("org/name")),
        ("GSAI-ML/LLaDA-8B-Base@v1.0", HubModel("GSAI-ML/LLaDA-8B-Base", "v1.0")),
        ("org/name@refs/pr/1", HubModel("org/name", "refs/pr/1")),
        ("name", None),
        ("./org/name", None),
        ("/org/name", None),
        ("a/b/c", None),
        ("~/name", None),
    ],
)
def test_hub_ids_are_told_from_paths(text: str, expected: HubModel | None) -> None:
    found = locate(text)
    assert found == expected if expected is not None else isinstance(found, Path)
    assert isinstance(locate(Path(text)), Path)


def test_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert locate("org/name") == (tmp_path / "org" / "name").resolve()


async def test_only_what_is_needed_is_fetched_weights_last(fetched: list[str], cache: Path) -> None:
    async with d2f_stream.load(REPO, device="cpu") as engine:
        assert engine.info.name == REPO
        result = await engine.generate([5, 6, 7], max_new_tokens=8).result()
    assert result.usage.completion_tokens > 0
    weights = [name for name in fetched if name.endswith(".safetensors")]
    assert sorted(weights) == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert sorted(fetched[-2:]) == sorted(weights)
    assert {"config.json", "vocab.json", "merges.txt", "tokenizer_config.json"} < set(fetched)
    assert not [n for n in fetched if not n.endswith((".json", ".txt", ".safetensors")) or "/" in n]


async def test_unknown_family_is_refused_before_its_weights_come(
    fetched: list[str], repository: Path
) -> None:
    config = json.loads((repository / "config.json").read_text()) | {"model_type": "other"}
    (repository / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="model_type 'other'"):
        async with d2f_stream.load(REPO, device="cpu"):
            pass
    assert not [name for name in fetched if name.endswith(".safetensors")]


def test_unknown_repository_and_revision_are_told_apart(fetched: list[str]) -> None:
    with pytest.raises(ModelNotFound, match="neither a folder nor a public repository org/other"):
        fetch_description(HubModel("org/other"))
    with pytest.raises(ModelNotFound, match=f"repository {REPO} has no revision 'v9'"):
        fetch_description(HubModel(REPO, "v9"))


async def test_cached_model_runs_offline(cache: Path, repository: Path) -> None:
    fill_cache(cache, repository)
    for name in (REPO, f"{REPO}@{COMMIT}"):
        async with d2f_stream.load(name, device="cpu") as engine:
            assert engine.info.name == REPO


async def test_uncached_model_offline_is_one_clear_error(cache: Path) -> None:
    with pytest.raises(
        ModelNotFound, match=rf"no folder {REPO}, and the repository .* not in the local cache"
    ):
        async with d2f_stream.load(REPO, device="cpu"):
            pass


def test_no_network_is_one_clear_error(
    cache: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")  # refuses connections
    with pytest.raises(ModelNotFound, match="not in the local cache and cannot be fetched"):
        fetch_description(HubModel(REPO))


def test_half_a_download_is_named_offline(cache: Path, repository: Path) -> None:
    fill_cache(cache, repository)
    folder = fetch_description(HubModel(REPO))
    fetch_weights(HubModel(REPO), folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(d2f_stream.ModelDamaged, match=r"index\.json is not valid JSON"):
        fetch_weights(HubModel(REPO), folder)


def test_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"needs huggingface_hub.*d2f-stream\[torch\]"):
        fetch_description(HubModel(REPO))
