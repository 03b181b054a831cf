"""Hub ids: what is fetched from a small hub on loopback, what is said where nothing can be."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import d2f_stream
from d2f_runtime.models.hub import HubModel, fetch_description, fetch_weights, locate
from d2f_stream.core.errors import MissingExtra, ModelNotFound, UnsupportedModel
from local_hub import COMMIT, REPO, LocalHub
from tiny_checkpoints import write_model

pytest.importorskip("transformers")
constants = pytest.importorskip("huggingface_hub.constants")
pytestmark = pytest.mark.torch


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
    hub = LocalHub(repository)
    with hub.online(cache, monkeypatch):
        yield hub.fetched


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
        ModelNotFound, match=rf"no folder {REPO}, and the repository .* HF_HUB_OFFLINE is set"
    ):
        async with d2f_stream.load(REPO, device="cpu"):
            pass


def test_no_network_is_one_clear_error(
    cache: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")  # refuses connections
    with pytest.raises(ModelNotFound, match=r"fetched: http://127.0.0.1:1 cannot be reached \("):
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
