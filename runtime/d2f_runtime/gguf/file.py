"""GgufFile: the metadata of a GGUF file, and where its tensors lie. Reads no weights.

Everything is checked against the file's size when it is opened, so that who reads a tensor
afterwards needs no checks of its own.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, Final

from d2f_runtime.gguf.header import Header, Value
from d2f_stream.core.errors import ModelDamaged, ModelNotFound, UnsupportedModel

__all__ = ["BLOCKS", "SUFFIX", "BlockType", "GgufFile", "GgufTensor", "is_gguf"]

SUFFIX: Final = ".gguf"
MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
MAX_DIMENSIONS: Final = 4
ALIGNMENT: Final = 32  # of tensors, where general.alignment names no other


@dataclass(frozen=True, slots=True)
class BlockType:
    """How the numbers of a tensor are stored: in blocks of `length` numbers and `num_bytes`."""

    name: str
    length: int
    num_bytes: int


BLOCKS: Final[Mapping[int, BlockType]] = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    30: BlockType("BF16", 1, 2),
}
"""Those that are read here, by their number in the file (ggml_type in ggml.h)."""

_NOT_READ: Final = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies and what it is.

    Attributes:
        name: in the file.
        shape: as torch has it, rows first; the file counts the other way round.
        type: of its blocks; a row is whole blocks.
        start: byte of the file at which it begins.
    """

    name: str
    shape: tuple[int, ...]
    type: BlockType
    start: int

    @property
    def num_rows(self) -> int:
        """How many rows of the last dimension's length it has."""
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """How many bytes of the file a row takes."""
        return self.shape[-1] // self.type.length * self.type.num_bytes

    @property
    def num_bytes(self) -> int:
        """How many bytes of the file it takes."""
        return self.num_rows * self.row_bytes


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What a GGUF file says of itself.

    Attributes:
        path: of the file.
        size: of the file, bytes.
        metadata: values by key.
        tensors: by name.
    """

    path: Path
    size: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]

    @classmethod
    def open(cls, path: Path) -> "GgufFile":
        """Read a file's head: some tenths of a second, and a few times its size in memory.

        Raises:
            ModelNotFound: there is no such file.
            ModelDamaged: it is no GGUF file, or cut off, or its head makes no sense.
            UnsupportedModel: a version, a byte order or a tensor's type that is not read here, or a
                file of several.
        """
        if not path.is_file():
            raise ModelNotFound(f"no model at {path}")
        with _opened(path) as file:
            size = path.stat().st_size
            _check_magic(path, file.read(len(MAGIC)))
            file.seek(0)
            header = Header(file, path, size)
            _, version = header.numbers("II", "the version")
            _check_version(path, version)
            num_tensors = header.count("tensors", bytes_each=8 + 4 + 8 + 4 + 8)
            num_keys = header.count("keys", bytes_each=8 + 4 + 1)
            metadata = _metadata(header, num_keys)
            _refuse_parts(path, metadata)
            tensors = _tensors(header, num_tensors, size, _alignment(path, metadata))
        return cls(path, size, metadata, tensors)

    def read(self, tensor: GgufTensor, rows: range | None = None) -> bytes:
        """Return the stored bytes of a tensor, or of some of its rows.

        Raises:
            ModelDamaged: the file was changed or cannot be read any more.
        """
        rows = range(tensor.num_rows) if rows is None else rows
        length = len(rows) * tensor.row_bytes
        with _opened(self.path) as file:
            file.seek(tensor.start + rows.start * tensor.row_bytes)
            stored = file.read(length)
        if len(stored) < length:
            raise ModelDamaged(
                f"{self.path} became shorter while {tensor.name} was read; fetch it again"
            )
        return stored


def is_gguf(path: Path) -> bool:
    """Whether a model is one file of this format, by its name."""
    return path.suffix.lower() == SUFFIX and not path.is_dir()


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb", buffering=1 << 16) as file:
            yield file
    except OSError as error:
        raise ModelDamaged(f"{path} cannot be read ({error}); fetch it again") from error


def _check_magic(path: Path, magic: bytes) -> None:
    if magic != MAGIC:
        raise ModelDamaged(
            f"{path} is no GGUF file: it begins with {magic!r}, not with {MAGIC!r}; fetch or "
            "convert it again"
        )


def _check_version(path: Path, version: int) -> None:
    if version in VERSIONS:
        return
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise UnsupportedModel(
            f"{path} is a big-endian GGUF file; this build reads little-endian ones"
        )
    known = " and ".join(map(str, VERSIONS))
    raise UnsupportedModel(
        f"{path} is of version {version} of GGUF, but this build reads {known}; convert it again "
        "with a current llama.cpp"
    )


def _metadata(header: Header, num_keys: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for index in range(num_keys):
        key = header.text(f"the name of key {index}")
        if key in metadata:
            raise ModelDamaged(f"{header.path} has the key {key} twice; fetch it again")
        metadata[key] = header.value(key)
    return metadata


def _refuse_parts(path: Path, metadata: Mapping[str, Value]) -> None:
    """Refuse what is not one whole model."""
    count = metadata.get("split.count", 1)
    if isinstance(count, int) and count > 1:
        raise UnsupportedModel(
            f"{path} is one of {count} files of a split model; join them with llama.cpp's "
            "llama-gguf-split --merge"
        )
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise UnsupportedModel(f"{path} holds a {kind}, not a model")


def _alignment(path: Path, metadata: Mapping[str, Value]) -> int:
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ModelDamaged(f"{path}: general.alignment is {alignment!r} but must be a power of two")
    return alignment


def _tensors(header: Header, number: int, size: int, alignment: int) -> dict[str, GgufTensor]:
    found: dict[str, GgufTensor] = {}
    for index in range(number):
        tensor = _tensor(header, index)
        if tensor.name in found:
            raise ModelDamaged(f"{header.path} has the tensor {tensor.name} twice; fetch it again")
        found[tensor.name] = tensor
    begin = -(-header.position // alignment) * alignment  # of the weights
    placed: dict[str, GgufTensor] = {}
    for name, tensor in found.items():
        if tensor.start % alignment:
            raise ModelDamaged(
                f"{header.path}: {name} begins at {tensor.start}, not at a multiple of {alignment}"
            )
        placed[name] = GgufTensor(name, tensor.shape, tensor.type, begin + tensor.start)
    _check_places(header.path, placed, size)
    return placed


def _tensor(header: Header, index: int) -> GgufTensor:
    """Read what the head says of a tensor, whose start counts from that of the weights."""
    name = header.text(f"the name of tensor {index}")
    (num_dimensions,) = header.numbers("I", name)
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise ModelDamaged(
            f"{header.path}: {name} has {num_dimensions} dimensions, but GGUF has 1 to "
            f"{MAX_DIMENSIONS}; fetch it again"
        )
    dimensions = header.numbers(f"{num_dimensions}Q", name)
    number, start = header.numbers("IQ", name)
    block = BLOCKS.get(number)
    if block is None:
        known = ", ".join(known.name for known in BLOCKS.values())
        raise UnsupportedModel(
            f"{header.path}: {name} is stored as {_NOT_READ.get(number, f'type {number}')}, but "
            f"this build reads {known}"
        )
    if min(dimensions) < 1 or dimensions[0] % block.length:
        raise ModelDamaged(
            f"{header.path}: {name} has the dimensions {list(dimensions)}, but {block.name} comes "
            f"in rows of whole blocks of {block.length}; fetch it again"
        )
    return GgufTensor(name, tuple(reversed(dimensions)), block, start)


def _check_places(path: Path, tensors: Mapping[str, GgufTensor], size: int) -> None:
    """Refuse tensors beyond the file or over each other: many could be made of few bytes."""
    end, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < end:
            raise ModelDamaged(f"{path}: {name} lies over {before}; fetch it again")
        end, before = tensor.start + tensor.num_bytes, name
        if end > size:
            raise ModelDamaged(
                f"{path} has {size} bytes, but {name} ({tensor.type.name}, shape "
                f"{list(tensor.shape)}) would end at byte {end}; the file is cut off or damaged, "
                "fetch it again"
            )
