import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from d2f_runtime.models.manifest import (
    FileInfo,
    Manifest,
    OnnxInfo,
    TransformerShape,
    encode_manifest,
    read_manifest,
    verify_files,
)
from d2f_stream.core.errors import ModelDamaged, ModelNotFound, UnsupportedModel
from d2f_stream.core.params import GenerationParams

CONTENT = b"weights"


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "format_version": 1,
        "name": "tiny",
        "family": "llada",
        "mask_id": 3,
        "eos_ids": (1, 2),
        "shift_logits": False,
        "prompt_attention": "full",
        "native_block_size": 16,
        "max_block_size": 32,
        "max_len": 512,
        "num_tokens": 1024,
        "transformer": TransformerShape(
            hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16
        ),
        "files": {
            "model.onnx": FileInfo(sha256=hashlib.sha256(CONTENT).hexdigest(), bytes=len(CONTENT))
        },
    }
    return Manifest(**fields | changes)


def stored() -> dict[str, Any]:
    """The fields as the file has them."""
    values: dict[str, Any] = msgspec.json.decode(encode_manifest(manifest()))
    return values


def write(folder: Path, content: Manifest | bytes) -> Path:
    encoded = content if isinstance(content, bytes) else encode_manifest(content)
    (folder / "manifest.json").write_bytes(encoded)
    (folder / "model.onnx").write_bytes(CONTENT)
    return folder


def test_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = manifest(onnx=OnnxInfo(opset=23, min_onnxruntime="1.23", quantization="int8"))
    assert read_manifest(write(tmp_path, written)) == written


def test_unknown_fields_are_ignored(tmp_path: Path) -> None:
    fields = stored() | {"added_later": [1, 2]}
    assert read_manifest(write(tmp_path, msgspec.json.encode(fields))) == manifest()


def test_folder_without_a_manifest_is_told_what_it_must_hold(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"manifest\.json, tokenizer\.json and model\.onnx"):
        read_manifest(tmp_path)
    with pytest.raises(ModelNotFound, match="nowhere"):
        read_manifest(tmp_path / "nowhere")


def test_broken_manifest_names_the_field(tmp_path: Path) -> None:
    fields = stored() | {"prompt_attention": "sideways"}
    with pytest.raises(ModelDamaged, match="prompt_attention"):
        read_manifest(write(tmp_path, msgspec.json.encode(fields)))
    with pytest.raises(ModelDamaged, match=r"manifest\.json cannot be read"):
        read_manifest(write(tmp_path, b'{"format_version": 1'))


def test_every_fact_is_in_the_file() -> None:
    assert list(stored())[:2] == ["format_version", "name"]
    assert stored()["vocab_size"] == manifest().num_tokens
    assert stored().keys() >= manifest().facts.keys() - {"num_tokens"}


@pytest.mark.parametrize("fact", ["family", "shift_logits", "max_len", "vocab_size"])
def test_manifest_that_lacks_a_fact_names_it(tmp_path: Path, fact: str) -> None:
    fields = stored()
    del fields[fact]
    with pytest.raises(ModelDamaged, match=f"it lacks {fact}"):
        read_manifest(write(tmp_path, msgspec.json.encode(fields)))


def test_other_format_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelDamaged, match="format version 2, but this build reads 1"):
        read_manifest(write(tmp_path, manifest(format_version=2)))


def test_a_newer_format_is_told_so_whatever_it_holds(tmp_path: Path) -> None:
    write(tmp_path, b'{"format_version": 2, "name": ["another", "kind"]}')
    with pytest.raises(ModelDamaged, match=r"has format version 2.* reads 1; export .* or update"):
        read_manifest(tmp_path)


def test_unknown_family_is_named_with_those_that_run(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedModel, match="'mamba', but this build runs a2d, dream, fast_dllm_v2"
    ):
        read_manifest(write(tmp_path, manifest(family="mamba")))


def test_files_that_match_are_fine(tmp_path: Path) -> None:
    verify_files(write(tmp_path, manifest()), manifest())


def test_missing_file_is_named(tmp_path: Path) -> None:
    (write(tmp_path, manifest()) / "model.onnx").unlink()
    with pytest.raises(ModelDamaged, match=r"model\.onnx is missing; .* expects 7 bytes"):
        verify_files(tmp_path, manifest())


def test_truncated_file_names_both_sizes(tmp_path: Path) -> None:
    (write(tmp_path, manifest()) / "model.onnx").write_bytes(CONTENT[:-2])
    with pytest.raises(ModelDamaged, match=r"model\.onnx has 5 bytes, but .* expects 7"):
        verify_files(tmp_path, manifest())


def test_changed_file_names_both_hashes(tmp_path: Path) -> None:
    (write(tmp_path, manifest()) / "model.onnx").write_bytes(CONTENT.upper())
    found, expected = (hashlib.sha256(c).hexdigest() for c in (CONTENT.upper(), CONTENT))
    with pytest.raises(ModelDamaged, match=rf"model\.onnx has SHA-256 {found}, .* {expected}"):
        verify_files(tmp_path, manifest())


def test_file_too_large_to_hash_is_checked_by_its_size(tmp_path: Path) -> None:
    (write(tmp_path, manifest()) / "model.onnx").write_bytes(CONTENT.upper())
    verify_files(tmp_path, manifest(), max_hash_bytes=6)
    with pytest.raises(ModelDamaged, match="SHA-256"):
        verify_files(tmp_path, manifest(), max_hash_bytes=7)


def test_file_outside_of_the_folder_is_refused(tmp_path: Path) -> None:
    for name in ("../model.onnx", "/model.onnx", "a/../../model.onnx"):
        outside = manifest(files={name: FileInfo(sha256="", bytes=0)})
        with pytest.raises(ModelDamaged, match="outside of its folder"):
            verify_files(tmp_path, outside)


def test_links_into_a_cache_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(CONTENT)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.onnx").symlink_to("../blob")
    verify_files(tmp_path / "snapshot", manifest())


def test_defaults_follow_the_device() -> None:
    model = manifest(
        defaults={"cpu": {"confidence_threshold": 0.8}, "cuda": {"stop": ["\n"], "block_size": 32}}
    )
    assert model.params_for("cpu") == GenerationParams(block_size=16, confidence_threshold=0.8)
    assert model.params_for("cuda:1") == GenerationParams(block_size=32, stop=("\n",))
    assert model.params_for("mps") == model.params_for("cpu")
    assert manifest().params_for("cpu") == GenerationParams(block_size=16)


@pytest.mark.parametrize("defaults", [{"top_p": 2.0}, {"max_tokens": 5}, {"stop": [""]}])
def test_defaults_that_are_no_params_name_the_model(defaults: Any) -> None:
    with pytest.raises(ModelDamaged, match="the cpu defaults of model tiny"):
        manifest(defaults={"cpu": defaults}).params_for("cpu")
