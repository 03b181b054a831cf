"""What tells models apart: their files, wherever those lie, and what their answers depend on."""

from pathlib import Path

import pytest

from d2f_runtime.backends.scripted import SCRIPTED_INFO, ByteCodec, ScriptedBackend
from d2f_runtime.loaded_model import ModelParts
from d2f_runtime.models.files_digest import digest_of_files
from d2f_stream.core.identity import ModelIdentity
from d2f_stream.core.params import GenerationParams

LARGE = 40 << 20


def folder(path: Path, **files: bytes) -> Path:
    path.mkdir()
    (path / "model.safetensors").write_bytes(files.get("weights", b"weights"))
    (path / "tokenizer.json").write_bytes(files.get("tokenizer", b"{}"))
    return path


def digest(path: Path, *more: Path) -> str:
    return digest_of_files(path, *more, weights=".safetensors")


def test_copies_are_one_model_and_changes_make_another(tmp_path: Path) -> None:
    first = folder(tmp_path / "first")
    copy = folder(tmp_path / "copy")
    (copy / "README.md").write_text("notes")
    assert digest(first) == digest(copy)
    weights = folder(tmp_path / "weights", weights=b"WEIGHTS")
    tokenizer = folder(tmp_path / "tokenizer", tokenizer=b"[]")
    found = {digest(first), digest(weights), digest(tokenizer), digest(first, weights)}
    assert len(found) == 4
    one_file = first / "model.safetensors"
    assert digest(one_file) not in found


@pytest.mark.parametrize("place", [0, LARGE // 2, LARGE - 1])
def test_change_of_a_part_of_large_weights_is_seen(tmp_path: Path, place: int) -> None:
    path = folder(tmp_path / "model") / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(LARGE)
    before = digest(path.parent)
    with path.open("r+b") as file:
        file.seek(max(0, place - (1 << 17)))  # of one row of a thousand, about
        file.write(b"x" * (1 << 17))
    assert path.stat().st_size == LARGE
    assert digest(path.parent) != before


def test_what_requests_leave_open_is_part_of_it() -> None:
    def of(params: GenerationParams, files: str = "00") -> ModelIdentity:
        backend = ScriptedBackend(info=SCRIPTED_INFO)
        identity = ModelParts(backend, ByteCodec(), params, files=files).info.identity
        assert identity is not None
        return identity

    params = GenerationParams(block_size=8)
    assert of(params) == of(GenerationParams(block_size=8))
    others = (of(GenerationParams(block_size=4)), of(params, "11"), of(params, ""))
    assert len({of(params).digest, *(other.digest for other in others)}) == 4
    assert str(of(params)).startswith("scripted (version ")
