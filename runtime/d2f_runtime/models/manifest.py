"""The manifest of a model folder: what the model is, how it is best run, what its files hash to.

A model folder holds manifest.json, tokenizer.json, chat_template.jinja where the model chats, and
the weights: model.onnx (with external data) or safetensors. Written by d2f_export, read here; knows
no backend.
"""

import hashlib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import msgspec

from d2f_runtime.models.facts import FAMILIES, About, ModelFacts
from d2f_runtime.text.files import holds_file, read_bytes
from d2f_stream.core.errors import InvalidParams, ModelDamaged, ModelNotFound, UnsupportedModel
from d2f_stream.core.params import MAX_BLOCK_SIZE, GenerationParams

__all__ = [
    "FILE_NAME",
    "FORMAT_VERSION",
    "FileInfo",
    "FixedWindow",
    "Manifest",
    "OnnxInfo",
    "TrainingInfo",
    "TransformerShape",
    "VerificationInfo",
    "encode_manifest",
    "read_manifest",
    "verify_files",
]

FORMAT_VERSION: Final = 1
FILE_NAME: Final = "manifest.json"
MAX_SIZE: Final = 2**31 - 1

_COUNTS: Final = ("native_block_size", "max_block_size", "max_len", "num_tokens")

STORED_AS: Final = {"num_tokens": "vocab_size"}
"""Facts that have another name in the file."""

ADDED_LATER: Final = ("commit_attention", "drafts_in_place")
"""Facts that older files lack."""

JsonValue = str | int | float | bool | None


class FileInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a file of the folder must be: SHA-256 in hex, and size."""

    sha256: str
    bytes: int


class TransformerShape(msgspec.Struct, frozen=True, kw_only=True):
    """What a cache must know of the transformer; key and value heads may be fewer than heads."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


class FixedWindow(msgspec.Struct, frozen=True, kw_only=True):
    """A graph with static shapes: its file, the window's width and the cache's columns."""

    file: str
    width: int
    capacity: int


class OnnxInfo(msgspec.Struct, frozen=True, kw_only=True):
    """How the ONNX graph was made, and what runs it.

    Attributes:
        opset: of ONNX's own operators.
        min_onnxruntime: the oldest that runs it.
        interface: version of the graph's inputs and outputs.
        target: what it was exported for: cpu, cuda or device.
        quantization: of the weights.
        windows: graphs with static shapes; none where model.onnx has symbolic ones.
        drafts: whether the graphs hold a draft adapter, and take which rows go through it.
    """

    opset: int
    min_onnxruntime: str
    interface: int = 1
    target: str = "cpu"
    quantization: str = "fp32"
    windows: tuple[FixedWindow, ...] = ()
    drafts: bool = False


class TrainingInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Where the weights come from: the command that made them, and what was measured."""

    command: str = ""
    figures: dict[str, JsonValue] = msgspec.field(default_factory=dict)


class VerificationInfo(msgspec.Struct, frozen=True, kw_only=True):
    """How the graph compared with the checkpoint: the command, whether it passed, the figures."""

    command: str
    passed: bool
    figures: dict[str, JsonValue] = msgspec.field(default_factory=dict)


class _Version(msgspec.Struct):
    format_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(ModelFacts):
    """The content of manifest.json. Unknown fields are ignored: the format may grow.

    Attributes:
        format_version: of this file; a reader refuses those that it does not know.
        name: for people and `StreamStarted.model`.
        transformer: the shape that the K/V storage follows from.
        defaults: GenerationParams fields for a kind of device, "cpu" or "cuda".
        files: name, relative to the folder, to hash and size.
        onnx: present where the folder holds an ONNX graph.
        verification: of the graph against the checkpoint that it was made of.
        training: where the weights come from.
        description, license, examples: see `About`.
    """

    format_version: int
    name: str
    transformer: TransformerShape
    defaults: dict[str, dict[str, JsonValue | list[str]]] = field(default_factory=dict)
    files: dict[str, FileInfo] = field(default_factory=dict)
    onnx: OnnxInfo | None = None
    verification: VerificationInfo | None = None
    training: TrainingInfo | None = None
    description: str = ""
    license: str = ""
    examples: tuple[str, ...] = ()

    @property
    def people(self) -> About:
        """What is told to people."""
        return About(description=self.description, license=self.license, examples=self.examples)

    def params_for(self, device: str) -> GenerationParams:
        """Return the defaults for a device such as "cpu" or "cuda:0".

        A device without defaults of its own takes those of the CPU; what they leave open is
        GenerationParams' own, save the block size, which is the model's.

        Raises:
            ModelDamaged: they are not valid parameters.
        """
        kind = device.partition(":")[0]
        chosen = self.defaults.get(kind, self.defaults.get("cpu", {}))
        values = {"block_size": self.native_block_size, **chosen}
        try:
            return msgspec.convert(values, GenerationParams)
        except (msgspec.ValidationError, InvalidParams) as error:
            raise ModelDamaged(f"the {kind} defaults of model {self.name}: {error}") from error


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest.json; the files it names are not looked at.

    Raises:
        ModelNotFound: no such folder, or it has no manifest.
        ModelDamaged: the manifest cannot be read, or is of another format version.
        UnsupportedModel: the model is of a family that this build does not know.
    """
    path = folder / FILE_NAME
    content = read_bytes(path)
    if content is None:
        raise ModelNotFound(
            f"no {FILE_NAME} in {folder}; a model folder holds {FILE_NAME}, tokenizer.json and "
            "model.onnx or *.safetensors"
        )
    try:
        version = msgspec.json.decode(content, type=_Version).format_version
        if version != FORMAT_VERSION:  # before the rest, which may mean something else there
            raise ModelDamaged(
                f"{path} has format version {version}, but this build reads {FORMAT_VERSION}; "
                "export the model again or update d2f-stream"
            )
        manifest = _decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelDamaged(f"{path} cannot be read: {error!s:.300}") from error
    _check(path, manifest)
    if manifest.family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedModel(
            f"{path} names the model family {manifest.family!r}, but this build runs {known}"
        )
    return manifest


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the content of manifest.json."""
    values: dict[str, Any] = msgspec.to_builtins(manifest)
    named = {STORED_AS.get(name, name): value for name, value in values.items()}
    head = {name: named[name] for name in ("format_version", "name")}
    return msgspec.json.format(msgspec.json.encode(head | named), indent=2) + b"\n"


def _decode(content: bytes) -> Manifest:
    values = msgspec.json.decode(content, type=dict[str, Any])
    for name in (fact.name for fact in fields(ModelFacts)):
        stored = STORED_AS.get(name, name)
        if stored in values:
            values[name] = values[stored]
        elif name not in ADDED_LATER:
            raise msgspec.ValidationError(f"it lacks {stored}")
    return msgspec.convert(values, Manifest)


def verify_files(folder: Path, manifest: Manifest, *, max_hash_bytes: int | None = None) -> None:
    """Check every file that the manifest names: first the sizes, then the hashes.

    Args:
        folder: the model's.
        manifest: read from it.
        max_hash_bytes: only the size is checked of files larger than that; None hashes all. A hash
            reads the whole file, at one or two GB/s.

    Raises:
        ModelDamaged: for the first that lacks, or differs; names the file, expected and found.
    """
    for name, expected in manifest.files.items():
        path = _inside(folder, name)
        if not holds_file(path):
            raise ModelDamaged(
                f"{folder / name[:200]} is missing; {FILE_NAME} expects {expected.bytes} bytes"
            )
        found = path.stat().st_size
        if found != expected.bytes:
            raise ModelDamaged(
                f"{path} has {found} bytes, but {FILE_NAME} expects {expected.bytes}"
            )
    for name, expected in manifest.files.items():
        if max_hash_bytes is not None and expected.bytes > max_hash_bytes:
            continue
        sha256 = _sha256(folder / name)
        if sha256 != expected.sha256.lower():
            raise ModelDamaged(
                f"{folder / name} has SHA-256 {sha256}, but {FILE_NAME} expects {expected.sha256}"
            )


def _check(path: Path, manifest: Manifest) -> None:
    """Refuse sizes and ids that no model has, which everything after this relies on."""
    sizes = msgspec.structs.asdict(manifest.transformer)
    sizes |= {name: getattr(manifest, name) for name in _COUNTS}
    for name, value in sizes.items():
        if not 1 <= value <= MAX_SIZE:
            raise ModelDamaged(f"{path}: {name} is {value}, not from 1 to {MAX_SIZE}")
    if manifest.native_block_size > MAX_BLOCK_SIZE:
        raise UnsupportedModel(
            f"{path} has blocks of {manifest.native_block_size} tokens, but this build runs at "
            f"most {MAX_BLOCK_SIZE}"
        )
    ids = (*manifest.eos_ids, manifest.mask_id)
    if not manifest.eos_ids or not 0 <= min(ids) <= max(ids) <= MAX_SIZE:
        raise ModelDamaged(
            f"{path}: the EOS ids are {manifest.eos_ids} and the mask id is {manifest.mask_id}; "
            "there must be one that ends an answer, and none below 0"
        )


def _inside(folder: Path, name: str) -> Path:
    """Return a file's path; links may lead out of the folder, as the hub's cache has them."""
    path = Path(name)
    if path.anchor or ".." in path.parts:
        raise ModelDamaged(f"{folder / FILE_NAME} names a file outside of its folder: {name:.200}")
    return folder / path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
