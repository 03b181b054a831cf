"""The head of a GGUF file: read as gguf-py reads it, and hostile ones refused in little time."""

import random
import struct
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from d2f_runtime.gguf import header
from d2f_runtime.gguf.file import BLOCKS, GgufFile, is_gguf
from d2f_stream.core.errors import (
    ModelDamaged,
    ModelError,
    ModelNotFound,
    UnsupportedModel,
)

HUGE = 1 << 62


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, packed: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + packed


def array(name: str, kind: int, length: int, packed: bytes) -> bytes:
    return key(name, 9, struct.pack("<IQ", kind, length) + packed)


def tensor(name: str, dimensions: list[int], kind: int = 0, start: int = 0) -> bytes:
    number = struct.pack("<I", len(dimensions))
    sizes = struct.pack(f"<{len(dimensions)}Q", *dimensions)
    return text(name) + number + sizes + struct.pack("<IQ", kind, start)


def whole(
    keys: list[bytes], tensors: list[bytes], *, weights: int = 0, version: int = 3, **counts: int
) -> bytes:
    """Return a file; `counts` lie about num_keys and num_tensors."""
    num_tensors = counts.get("num_tensors", len(tensors))
    num_keys = counts.get("num_keys", len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys)
    head += b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(weights)


GOOD = whole(
    [key("general.architecture", 8, text("llama")), array("tokens", 8, 2, text("a") + text("b"))],
    [tensor("token_embd.weight", [32, 2]), tensor("output_norm.weight", [32], start=256)],
    weights=256 + 128,
)


def refusal(path: Path, content: bytes) -> ModelError:
    """Return the error; whatever the bytes say, it comes at once and takes no memory."""
    path.write_bytes(content)
    tracemalloc.start()
    begin = time.perf_counter()
    with pytest.raises(ModelError) as caught:
        GgufFile.open(path)
    seconds = time.perf_counter() - begin
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert seconds < 1
    assert str(path) in str(caught.value)
    return caught.value


@pytest.fixture
def path() -> Iterator[Path]:
    memory = Path("/dev/shm")  # thousands of files are written, and disks are slow
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder) / "model.gguf"


def test_head_is_what_gguf_py_reads(path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    from tiny_gguf import oracle, write_gguf

    write_gguf(path, "qwen3", oracle("qwen3"), stored="Q5_K", metadata={"general.flag": True})
    ours, theirs = GgufFile.open(path), gguf.GGUFReader(path)
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            value = field.contents()
            assert ours.metadata[name] == (tuple(value) if isinstance(value, list) else value)
    assert len(ours.tensors) == len(theirs.tensors)
    for found in theirs.tensors:
        mine = ours.tensors[found.name]
        assert (mine.start, mine.num_bytes) == (found.data_offset, found.n_bytes)
        assert mine.shape == tuple(reversed(found.shape.tolist()))
        assert mine.type.name == found.tensor_type.name
        assert ours.read(mine) == found.data.tobytes()
    for number, block in BLOCKS.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == block.name
        assert gguf.GGML_QUANT_SIZES[kind] == (block.length, block.num_bytes)


def test_good_file_of_either_version(path: Path) -> None:
    for version in (2, 3):
        path.write_bytes(GOOD[:4] + struct.pack("<I", version) + GOOD[8:])
        file = GgufFile.open(path)
        assert file.metadata == {"general.architecture": "llama", "tokens": ("a", "b")}
        assert file.tensors["token_embd.weight"].shape == (2, 32)
        assert file.tensors["output_norm.weight"].num_bytes == 128


def test_file_cut_off_anywhere(path: Path) -> None:
    for length in range(len(GOOD)):
        error = refusal(path, GOOD[:length])
        assert isinstance(error, ModelDamaged)
        assert ("is no GGUF file" if length < 4 else "cut off or damaged") in str(error)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "begins with b''"),
        (b"GG", "begins with b'GG'"),
        (b"PK\x03\x04" + bytes(100), "is no GGUF file"),
        (whole([], [], num_keys=HUGE), f"{HUGE} keys would end at byte"),
        (whole([], [], num_keys=(1 << 64) - 1), "keys would end at byte"),
        (whole([], [], num_tensors=HUGE), f"{HUGE} tensors would end at byte"),
        (whole([struct.pack("<Q", HUGE) + bytes(8)], []), "the name of key 0 would end at byte"),
        (whole([struct.pack("<Q", 5) + b"\xff" * 9], []), "key 0 is not UTF-8"),
        (whole([key("a", 13, b"12345678")], []), "a has the value type 13"),
        (whole([key("a", 8, struct.pack("<Q", HUGE))], []), "a would end at byte"),
        (whole([key("a", 8, struct.pack("<Q", 1 << 63))], []), "a would end at byte"),
        (whole([array("a", 0, HUGE, b"")], []), "items of a would end at byte"),
        (whole([array("a", 8, HUGE, b"")], []), "items of a would end at byte"),
        (whole([array("a", 12, (1 << 61) + 1, b"")], []), "items of a would end at byte"),
        (whole([key("a", 4, b"1234"), key("a", 4, b"1234")], []), "has the key a twice"),
        (whole([], [tensor("w", [HUGE])]), f"w (F32, shape [{HUGE}]) would end at byte"),
        (whole([], [tensor("w", [1 << 32, 1 << 32])]), "w (F32, shape [4294967296, 4294967296])"),
        (whole([], [tensor("w", [1 << 63] * 4, kind=12)]), "w (Q4_K, shape"),
        (whole([], [tensor("w", [32, 0])], weights=64), "dimensions [32, 0]"),
        (whole([], [tensor("w", [40, 2], kind=2)], weights=640), "whole blocks of 32"),
        (whole([], [tensor("w", [])], weights=64), "w has 0 dimensions"),
        (whole([], [tensor("w", [2] * 5)], weights=128), "w has 5 dimensions"),
        (whole([], [tensor("w", [8], start=HUGE)], weights=64), "w (F32, shape [8]) would end"),
        (whole([], [tensor("w", [8], start=4)], weights=64), "not at a multiple of 32"),
        (whole([], [tensor("w", [8])] * 2, weights=64), "has the tensor w twice"),
        (whole([], [tensor("v", [8]), tensor("w", [8])], weights=64), "w lies over v"),
        (
            whole([key("general.alignment", 4, struct.pack("<I", 24))], []),
            "general.alignment is 24 but must be a power of two",
        ),
        (
            whole([key("general.alignment", 8, text("wide"))], []),
            "general.alignment is 'wide' but must be",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_head(path: Path, content: bytes, says: str) -> None:
    error = refusal(path, content)
    assert isinstance(error, ModelDamaged)
    assert says in str(error)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (whole([], [], version=1), "version 1 of GGUF, but this build reads 2 and 3"),
        (whole([], [], version=3 << 24), "big-endian"),
        (whole([], [], version=77), "version 77"),
        (whole([array("a", 9, 1, bytes(64))], []), "an array of arrays"),
        (whole([], [tensor("w", [32], kind=20)], weights=64), "w is stored as IQ4_NL, but"),
        (whole([], [tensor("w", [32], kind=4)], weights=64), "w is stored as type 4, but"),
        (whole([], [tensor("w", [32], kind=1 << 31)], weights=64), "stored as type 2147483648"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_read_here(path: Path, content: bytes, says: str) -> None:
    error = refusal(path, content)
    assert isinstance(error, UnsupportedModel)
    assert says in str(error)


def test_heads_beyond_any_model_are_refused_though_the_file_holds_them(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = array("tokens", 8, 1000, text("") * 1000)
    monkeypatch.setattr(header, "MAX_ITEMS", 999)
    assert "more than the 999 that are read here" in str(refusal(path, whole([items], [])))
    monkeypatch.undo()
    monkeypatch.setattr(header, "MAX_BYTES", 4000)
    assert "metadata of more than 4000 bytes" in str(refusal(path, whole([items], [])))
    monkeypatch.undo()
    path.write_bytes(whole([items], []))
    assert GgufFile.open(path).metadata == {"tokens": ("",) * 1000}


def test_any_byte_may_be_wrong(path: Path) -> None:
    """Ten thousand files with some bytes changed: each is read, or refused by one of our errors."""
    rng = random.Random(0)
    ends = [bytes([255] * 8), bytes(8), struct.pack("<Q", HUGE), struct.pack("<Q", 1 << 31)]
    num_refused = 0
    for _ in range(10_000):
        content = bytearray(GOOD)
        for _ in range(rng.randrange(1, 4)):
            start = rng.randrange(len(GOOD) - 384)
            changed = rng.choice(ends) if rng.random() < 0.5 else rng.randbytes(1)
            content[start : start + len(changed)] = changed
        path.write_bytes(content)
        try:
            GgufFile.open(path)
        except ModelError as error:
            num_refused += str(path) in str(error)
    assert 5_000 < num_refused < 10_000


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no model at"):
        GgufFile.open(tmp_path / "nowhere.gguf")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(ModelNotFound, match="no model at"):
        GgufFile.open(tmp_path / "folder.gguf")
    assert not is_gguf(tmp_path / "folder.gguf")
    assert is_gguf(tmp_path / "Model.GGUF")


def test_file_that_is_cut_off_while_it_is_used(path: Path) -> None:
    path.write_bytes(GOOD)
    file = GgufFile.open(path)
    path.write_bytes(GOOD[:-32])
    with pytest.raises(ModelDamaged, match=r"shorter while output_norm\.weight was read"):
        file.read(file.tensors["output_norm.weight"])
    path.unlink()
    with pytest.raises(ModelDamaged, match="cannot be read"):
        file.read(file.tensors["output_norm.weight"])
