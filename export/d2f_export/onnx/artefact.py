"""Artefact: a model folder that the runtime runs: graph, weights, tokenizer, template, manifest.

The folder appears under its name only when it is whole; see whole_folder.
"""

import hashlib
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

import msgspec

from d2f_export.onnx.graph import FixedShape, StepGraph, step_graph
from d2f_export.onnx.graph_builder import OPSET
from d2f_export.onnx.quantize import QUANTIZATIONS, Quantization
from d2f_export.onnx.weights import INLINE_BYTES, Checkpoint, num_bytes, write_graphs
from d2f_export.onnx.whole_folder import whole_or_absent
from d2f_runtime.backends.onnx_session import GRAPH_FILE, GRAPH_INTERFACE
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.facts import About
from d2f_runtime.models.manifest import (
    FILE_NAME,
    FORMAT_VERSION,
    FileInfo,
    FixedWindow,
    JsonValue,
    Manifest,
    OnnxInfo,
    TrainingInfo,
    TransformerShape,
    encode_manifest,
)
from d2f_runtime.text.gguf_tokens import GgufTokens
from d2f_runtime.text.tokenizer import token_source
from d2f_runtime.text.tokenizer_files import TokenizerFiles
from d2f_stream.core.errors import InvalidParams, ModelNotFound
from d2f_stream.core.params import GenerationParams

__all__ = [
    "MIN_ONNXRUNTIME",
    "QUANTIZATION_OF",
    "Defaults",
    "Description",
    "Target",
    "describe",
    "file_info",
    "write_artefact",
]

MIN_ONNXRUNTIME: Final = "1.23.0"  # the first with opset 23; 1.23.2, 1.24.1 and 1.31.1 were run

Target = Literal["cpu", "cuda", "device"]
QUANTIZATION_OF: Final[dict[Target, Quantization]] = {
    "cpu": "int8",
    "cuda": "fp16",
    "device": "int8",
}

DATA_FILE: Final = GRAPH_FILE + ".data"
TOKENIZER_FILE: Final = "tokenizer.json"
TEMPLATE_FILE: Final = "chat_template.jinja"

Defaults = dict[str, dict[str, JsonValue | list[str]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What an artefact says of itself beside what its checkpoint does.

    Attributes:
        name: the model's, for people.
        defaults: GenerationParams fields by kind of device ("cpu", "cuda").
        training: where the weights come from.
        about: what is told to people.
        tokenizer: tokenizer.json; None takes the checkpoint's tokenizer files.
        chat_template: jinja text, instead of the checkpoint's.
    """

    name: str
    defaults: Defaults = field(default_factory=dict)
    training: TrainingInfo | None = None
    about: About = field(default_factory=About)
    tokenizer: Path | None = None
    chat_template: str | None = None


def write_artefact(
    checkpoint_folder: Path,
    output_folder: Path,
    description: Description,
    *,
    target: Target = "cpu",
    quantization: Quantization | None = None,
    adapter: Path | None = None,
    family: str | None = None,
    window: int = 64,
    capacity: int = 512,
) -> Manifest:
    """Export a checkpoint as an ONNX model folder.

    Weights are read, converted and written one by one: host memory holds the largest matrix twice,
    not the model.

    Args:
        checkpoint_folder: config.json and safetensors, in this project's layout or a published one;
            or a GGUF file.
        output_folder: appears when everything is written; one of that name is replaced.
        description: of the artefact.
        target: "cpu" and "cuda" are one graph with symbolic shapes, "device" two with static ones.
        quantization: of the weights; None is the target's.
        adapter: folder of a LoRA adapter to merge, or of a draft adapter, which the graph keeps
            beside the base.
        family: which the model is of, where its files do not tell; see `family_of`.
        window: positions of the narrower graph for "device"; the other one holds `capacity`.
        capacity: prompt and answer for "device", tokens.

    Raises:
        ModelNotFound: the checkpoint or the tokenizer is missing.
        ModelDamaged: the checkpoint cannot be read, or the defaults are no valid parameters.
        UnsupportedModel: the family or the adapter is not known.
        InvalidParams: there is no such quantization, the window does not fit the capacity, or
            something else lies in the output folder, which would be lost.
        OSError: the disk is full, or the folder cannot be written.
    """
    quantization = quantization or QUANTIZATION_OF[target]
    if quantization not in QUANTIZATIONS:
        raise InvalidParams("quantize", quantization, f"one of {', '.join(QUANTIZATIONS)}")
    checkpoint = Checkpoint(checkpoint_folder, adapter=adapter, family=family)
    config = checkpoint.config
    capacity = min(capacity, config.max_len)
    if not 1 <= window <= capacity:
        raise InvalidParams("window", window, f"between 1 and the capacity of {capacity} tokens")
    _check_output(output_folder, checkpoint_folder)
    tokenizer = _tokenizer(checkpoint_folder, description)
    graphs, onnx = _graphs(checkpoint, target, quantization, window, capacity)
    with whole_or_absent(output_folder) as unfinished:
        _check_room(graphs, unfinished)
        _write_graphs(graphs, checkpoint, unfinished)
        if isinstance(tokenizer, Path):
            shutil.copyfile(tokenizer, unfinished / TOKENIZER_FILE)
        else:
            tokenizer.write(unfinished)
        if description.chat_template is not None:
            (unfinished / TEMPLATE_FILE).write_text(description.chat_template, encoding="utf-8")
        files = {path.name: file_info(path) for path in sorted(unfinished.iterdir())}
        if onnx.windows:
            config = replace(config, max_len=capacity)
            description = replace(description, defaults=_fitting(description.defaults, capacity))
        manifest = describe(config, description, files=files, onnx=onnx)
        (unfinished / FILE_NAME).write_bytes(_encoded(manifest))
    return manifest


def _fitting(defaults: Defaults, capacity: int) -> Defaults:
    """Return defaults whose answers leave half of a static graph's tokens to the prompt."""
    fitted: Defaults = {}
    for kind, fields in (defaults or {"cpu": {}}).items():
        asked = fields.get("max_new_tokens", GenerationParams().max_new_tokens)
        most = max(1, capacity // 2)
        fitted[kind] = fields | {
            "max_new_tokens": min(asked, most) if isinstance(asked, int) else asked
        }
    return fitted


def _check_output(folder: Path, checkpoint: Path) -> None:
    """Refuse to replace what is no artefact."""
    is_artefact = (folder / FILE_NAME).is_file() and (folder / GRAPH_FILE).is_file()
    if folder.resolve() == checkpoint.resolve() or (
        folder.exists() and not is_artefact and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise InvalidParams("output", str(folder), "a new folder, or an exported model to replace")


def _graphs(
    checkpoint: Checkpoint,
    target: Target,
    quantization: Quantization,
    window: int,
    capacity: int,
) -> tuple[dict[str, StepGraph], OnnxInfo]:
    """Return the target's graphs by file, and what the manifest says of them."""
    fixed: dict[str, FixedShape | None] = {GRAPH_FILE: None}
    if target == "device":
        wide = f"model-{capacity}.onnx"
        fixed = {GRAPH_FILE: FixedShape(window, capacity), wide: FixedShape(capacity, capacity)}
    config, ranks = checkpoint.config, checkpoint.draft_ranks
    graphs = {
        file: step_graph(config, quantization, fixed=f, draft_ranks=ranks)
        for file, f in fixed.items()
    }
    onnx = OnnxInfo(
        opset=OPSET,
        min_onnxruntime=MIN_ONNXRUNTIME,
        interface=GRAPH_INTERFACE,
        target=target,
        quantization=quantization,
        windows=tuple(
            FixedWindow(file=file, width=f.window, capacity=f.capacity)
            for file, f in fixed.items()
            if f is not None
        ),
        drafts=ranks is not None,
    )
    return graphs, onnx


def _tokenizer(checkpoint: Path, description: Description) -> Path | TokenizerFiles | GgufTokens:
    """Return the tokenizer.json that is asked for, else what the checkpoint has."""
    path = description.tokenizer
    if path is None:
        return token_source(checkpoint)
    if not path.is_file():
        raise ModelNotFound(f"no tokenizer at {path}")
    return path


def _write_graphs(graphs: dict[str, StepGraph], checkpoint: Checkpoint, folder: Path) -> None:
    is_large = len(graphs) > 1 or any(num_bytes(g) > INLINE_BYTES for g in graphs.values())
    data = folder / DATA_FILE if is_large else None
    write_graphs({folder / name: g for name, g in graphs.items()}, checkpoint, data=data)


def _check_room(graphs: dict[str, StepGraph], folder: Path) -> None:
    needed = max(num_bytes(graph) for graph in graphs.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"the weights take {needed / 1e9:.1f} GB, but {folder.parent} has {free / 1e9:.1f} GB "
            "free; choose another folder or a smaller quantization"
        )


def _encoded(manifest: Manifest) -> bytes:
    for device in manifest.defaults:
        manifest.params_for(device)  # raises where they are no valid parameters
    return encode_manifest(manifest)


def describe(
    config: TransformerConfig,
    description: Description,
    *,
    files: dict[str, FileInfo],
    onnx: OnnxInfo | None,
) -> Manifest:
    """Return the manifest of a model with this config."""
    return Manifest(
        **config.facts,
        format_version=FORMAT_VERSION,
        name=description.name,
        transformer=msgspec.convert(config, TransformerShape, from_attributes=True),
        defaults=description.defaults,
        files=files,
        onnx=onnx,
        training=description.training,
        **description.about.about,
    )


def file_info(path: Path) -> FileInfo:
    """Return a file's hash and size."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return FileInfo(sha256=digest.hexdigest(), bytes=path.stat().st_size)
