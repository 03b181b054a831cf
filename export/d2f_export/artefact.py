"""Writes a model folder that the runtime runs: graph, tokenizer, template, manifest.

The folder appears under its name only when it is whole.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final, Literal

import msgspec

from d2f_export.onnx_graph import OPSET, export_graph
from d2f_export.quantize import quantize_int8
from d2f_runtime.backends.onnx_backend import GRAPH_FILE
from d2f_runtime.manifest import (
    FILE_NAME,
    FORMAT_VERSION,
    FileInfo,
    JsonValue,
    Manifest,
    OnnxInfo,
    TrainingInfo,
    TransformerShape,
)
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_runtime.models.config import TransformerConfig
from d2f_stream.errors import ModelNotFound

__all__ = ["MIN_ONNXRUNTIME", "write_artefact", "write_checkpoint_manifest"]

MIN_ONNXRUNTIME: Final = "1.23.0"  # the first with opset 23; 1.23.2, 1.24.1 and 1.31.1 were run

TOKENIZER_FILE: Final = "tokenizer.json"
TEMPLATE_FILE: Final = "chat_template.jinja"

Defaults = dict[str, dict[str, JsonValue | list[str]]]


def write_artefact(
    checkpoint_folder: Path,
    output_folder: Path,
    *,
    name: str,
    tokenizer_path: Path,
    quantization: Literal["int8", "fp32"] = "int8",
    chat_template: str | None = None,
    defaults: Defaults | None = None,
    training: TrainingInfo | None = None,
    description: str = "",
) -> Manifest:
    """Export a checkpoint as an ONNX model folder.

    Args:
        checkpoint_folder: config.json and model.safetensors.
        output_folder: appears when everything is written; one of that name is replaced.
        name: the model's, for people.
        tokenizer_path: tokenizer.json.
        quantization: of the weights in the graph.
        chat_template: jinja text, where the model chats.
        defaults: GenerationParams fields by kind of device ("cpu", "cuda").
        training: where the weights come from.
        description: what the model can do, for its users.

    Raises:
        ModelNotFound: the checkpoint or the tokenizer is missing.
        ModelDamaged: the checkpoint cannot be read, or the defaults are no valid parameters.
    """
    model = load_checkpoint(checkpoint_folder)
    if not tokenizer_path.is_file():
        raise ModelNotFound(f"no tokenizer at {tokenizer_path}")
    output_folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output_folder.name}-", dir=output_folder.parent))
    try:
        graph = unfinished / GRAPH_FILE
        if quantization == "int8":
            exported = unfinished / "fp32.onnx"
            export_graph(model, exported)
            quantize_int8(exported, graph)
            exported.unlink()
        else:
            export_graph(model, graph)
        shutil.copyfile(tokenizer_path, unfinished / TOKENIZER_FILE)
        if chat_template is not None:
            (unfinished / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
        manifest = _manifest(
            model.config,
            name=name,
            files={path.name: _file_info(path) for path in sorted(unfinished.iterdir())},
            onnx=OnnxInfo(opset=OPSET, min_onnxruntime=MIN_ONNXRUNTIME, quantization=quantization),
            defaults=defaults or {},
            training=training,
            description=description,
        )
        (unfinished / FILE_NAME).write_bytes(_encoded(manifest))
        unfinished.chmod(0o755)  # mkdtemp's are private
        _replace(unfinished, output_folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return manifest


def write_checkpoint_manifest(
    folder: Path,
    *,
    name: str,
    defaults: Defaults | None = None,
    training: TrainingInfo | None = None,
    description: str = "",
) -> Manifest:
    """Write the manifest of a checkpoint folder for the torch backend, over all its other files.

    Args:
        folder: config.json, model.safetensors, tokenizer.json and what else the model has.
        name: the model's, for people.
        defaults: see write_artefact.
        training: see write_artefact.
        description: see write_artefact.

    Raises:
        ModelNotFound: there is no checkpoint in the folder.
        ModelDamaged: the checkpoint cannot be read, or the defaults are no valid parameters.
    """
    paths = sorted(path for path in folder.iterdir() if path.name != FILE_NAME)
    manifest = _manifest(
        load_checkpoint(folder).config,
        name=name,
        files={path.name: _file_info(path) for path in paths},
        onnx=None,
        defaults=defaults or {},
        training=training,
        description=description,
    )
    unfinished = folder / f".{FILE_NAME}"
    unfinished.write_bytes(_encoded(manifest))
    os.replace(unfinished, folder / FILE_NAME)
    return manifest


def _encoded(manifest: Manifest) -> bytes:
    for device in manifest.defaults:
        manifest.params_for(device)  # raises where they are no valid parameters
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def _manifest(
    config: TransformerConfig,
    *,
    name: str,
    files: dict[str, FileInfo],
    onnx: OnnxInfo | None,
    defaults: Defaults,
    training: TrainingInfo | None,
    description: str,
) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        family=config.family,
        mask_id=config.mask_id,
        eos_ids=config.eos_ids,
        shift_logits=config.shift_logits,
        prompt_attention=config.prompt_attention,
        native_block_size=config.native_block_size,
        max_block_size=config.max_block_size,
        max_len=config.max_len,
        vocab_size=config.num_tokens,
        transformer=TransformerShape(
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        ),
        defaults=defaults,
        files=files,
        onnx=onnx,
        training=training,
        description=description,
    )


def _file_info(path: Path) -> FileInfo:
    data = path.read_bytes()
    return FileInfo(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def _replace(folder: Path, target: Path) -> None:
    """Give `folder` the name `target`; an old one steps aside first and is then removed."""
    if not target.exists():
        os.rename(folder, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    os.rename(target, old / target.name)
    try:
        os.rename(folder, target)
    except OSError:
        os.rename(old / target.name, target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
