"""Weights on disk: a folder with config.json (`TransformerConfig`) and model.safetensors.

Only this project's own layout: parameter names are those of `Transformer`; a tied head is left out.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.transformer import Transformer
from d2f_stream.errors import ModelDamaged, ModelNotFound

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "load_checkpoint", "read_config", "save_checkpoint"]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TIED_HEAD = "lm_head.weight"


def save_checkpoint(folder: Path, model: Transformer, *, dtype: torch.dtype | None = None) -> None:
    """Write the model into `folder`, which is made where needed.

    Args:
        folder: gets config.json and model.safetensors.
        model: the weights; unchanged.
        dtype: of the stored weights; None keeps them as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if not (name == TIED_HEAD and model.config.tie_embeddings)
    }
    save_file(weights, folder / WEIGHTS_FILE)
    text = json.dumps(model.config.to_dict(), indent=2) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def read_config(folder: Path) -> TransformerConfig:
    """Read config.json.

    Raises:
        ModelNotFound: no such folder or file.
        ModelDamaged: the file is not a JSON object.
        UnsupportedModel: it holds a key that this build does not know, or lacks one.
    """
    path = _existing(folder, CONFIG_FILE)
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise ModelDamaged(f"{path} is not valid JSON: {exc}") from exc
    if not isinstance(values, dict):
        raise ModelDamaged(f"{path} holds no JSON object")
    return TransformerConfig.from_dict(values)


def load_checkpoint(folder: Path) -> Transformer:
    """Build the folder's model on the CPU, in the stored dtype.

    Raises:
        ModelNotFound: the folder or one of its files is missing.
        ModelDamaged: a file is truncated, or a tensor is missing, unknown or of the wrong shape.
        UnsupportedModel: the config is not for this build.
    """
    config = read_config(folder)
    path = _existing(folder, WEIGHTS_FILE)
    weights = _read_tensors(path)
    with torch.device("meta"):
        model = Transformer(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_embeddings:
        del expected[TIED_HEAD]
    _check_tensors(path, weights, expected)
    if config.tie_embeddings:
        weights[TIED_HEAD] = weights["embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model


def _existing(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise ModelNotFound(f"no model folder at {folder}")
    path = folder / name
    if not path.is_file():
        raise ModelNotFound(f"{folder} has no {name}; is it a d2f_stream model folder?")
    return path


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as exc:
        raise ModelDamaged(f"{path} cannot be read ({exc}); fetch or export it again") from exc


def _check_tensors(
    path: Path, weights: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]]
) -> None:
    if missing := sorted(set(expected) - set(weights)):
        raise ModelDamaged(f"{path} lacks the tensor {missing[0]} ({len(missing)} in all)")
    if unknown := sorted(set(weights) - set(expected)):
        raise ModelDamaged(f"{path} has the unknown tensor {unknown[0]} ({len(unknown)} in all)")
    for name, shape in expected.items():
        found = tuple(weights[name].shape)
        if found != shape:
            raise ModelDamaged(f"{path}: {name} has shape {found} but the config asks for {shape}")
