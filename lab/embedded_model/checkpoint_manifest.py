"""The manifest of a checkpoint folder, for the torch backend."""

import os
from pathlib import Path

from d2f_export.onnx.artefact import Description, describe, file_info
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_runtime.models.manifest import FILE_NAME, Manifest, encode_manifest

__all__ = ["write_checkpoint_manifest"]


def write_checkpoint_manifest(folder: Path, description: Description) -> Manifest:
    """Write the manifest of a checkpoint folder, over all its other files.

    Args:
        folder: config.json, model.safetensors, tokenizer.json and what else the model has.
        description: of it.

    Raises:
        ModelNotFound: there is no checkpoint in the folder.
        ModelDamaged: the checkpoint cannot be read, or the defaults are no valid parameters.
    """
    paths = sorted(path for path in folder.iterdir() if path.name != FILE_NAME)
    files = {path.name: file_info(path) for path in paths}
    manifest = describe(load_checkpoint(folder).config, description, files=files, onnx=None)
    for device in manifest.defaults:
        manifest.params_for(device)  # raises where they are no valid parameters
    unfinished = folder / f".{FILE_NAME}"
    unfinished.write_bytes(encode_manifest(manifest))
    os.replace(unfinished, folder / FILE_NAME)
    return manifest
