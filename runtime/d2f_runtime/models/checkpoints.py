"""Weights on disk: a folder with config.json and model.safetensors, whole or in shards.

Two layouts are read. In this project's own, config.json is a `TransformerConfig`, parameter names
are those of `Transformer`, and a tied head is left out. In those of the published families,
config.json has a model_type; see `families`.
"""

import json
import logging
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from d2f_runtime.models.adapters import Adapter
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.config_file import ConfigFile
from d2f_runtime.models.families import published_name
from d2f_runtime.models.published import is_published, read_published
from d2f_runtime.models.shards import Shards
from d2f_runtime.models.transformer import Transformer
from d2f_stream.errors import ModelNotFound, UnsupportedModel

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "load_checkpoint", "read_config", "save_checkpoint"]

logger = logging.getLogger("d2f_stream.checkpoints")

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TIED_HEAD = "lm_head.weight"
ROTARY_BUFFER = ".rotary_emb.inv_freq"  # stored by older versions of transformers


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
    """Read config.json; of a published model, also what names its mask and EOS.

    Raises:
        ModelNotFound: no such folder or file.
        ModelDamaged: the file is not a JSON object, or nothing names the mask or the EOS.
        UnsupportedModel: it is of a family or holds a key that this build does not know, or lacks
            one.
    """
    file = _config_file(folder)
    if is_published(file):
        return read_published(folder).config
    return TransformerConfig.from_dict(dict(file.values))


def load_checkpoint(
    folder: Path,
    *,
    adapter: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Transformer:
    """Build the folder's model, tensor by tensor, on the device.

    Everything is checked by the files' headers before the first weight is read. Host memory holds
    no more than the shard that is being read, beside the model itself where that is the device.

    Args:
        folder: of the model, in this project's layout or a published one.
        adapter: folder of a LoRA adapter to merge.
        device: where the weights go.
        dtype: of the weights; None keeps the stored one.

    Raises:
        ModelNotFound: a folder or one of its files is missing.
        ModelDamaged: a file is truncated, or a tensor is missing, unknown or of the wrong shape.
        UnsupportedModel: config, weights or adapter are not for this build or for each other.
    """
    file = _config_file(folder)
    if is_published(file):
        published = read_published(folder)
        config, layout = published.config, published.family.layout
    else:
        config, layout = TransformerConfig.from_dict(dict(file.values)), None
    shards = Shards.open(folder, WEIGHTS_FILE)
    with torch.device("meta"):
        model = Transformer(config)
    names = {  # those in the checkpoint, by ours
        name: name if layout is None else published_name(layout, name)
        for name in model.state_dict()
    }
    tied = names.pop(TIED_HEAD) if config.tie_embeddings else ""
    expected = {names[n]: tuple(t.shape) for n, t in model.state_dict().items() if n in names}
    buffers = {name for name in shards.headers if name.endswith(ROTARY_BUFFER)}
    shards.check(expected, ignored={tied, *buffers})
    merge = None if adapter is None else _open_adapter(adapter, file, config, names, expected)
    weights = _read(shards, names, merge, torch.device(device), dtype)
    if config.tie_embeddings:
        weights[TIED_HEAD] = weights["embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model


def _config_file(folder: Path) -> ConfigFile:
    if not folder.is_dir():
        raise ModelNotFound(f"no model folder at {folder}")
    file = ConfigFile.read(folder / CONFIG_FILE)
    if file is None:
        raise ModelNotFound(f"{folder} has no {CONFIG_FILE}; is it a model folder?")
    return file


def _open_adapter(
    folder: Path,
    base: ConfigFile,
    config: TransformerConfig,
    names: dict[str, str],
    expected: dict[str, tuple[int, ...]],
) -> Adapter:
    if not folder.is_dir():
        raise ModelNotFound(f"no adapter folder at {folder}")
    adapter = Adapter.open(folder, expected)
    if config.tie_embeddings and names["embed_tokens.weight"] in adapter.names:
        raise UnsupportedModel(f"{folder} adapts an embedding that is the head as well")
    name = _published_as(base)
    if name is not None and name != adapter.base.rpartition("/")[2]:  # such as Base and Instruct
        logger.warning("%s was made for %s, but is merged into %s", folder, adapter.base, name)
    return adapter


def _published_as(config: ConfigFile) -> str | None:
    """Return the name of a model's repository, where its folder or its config tells."""
    for part in config.path.parts:
        if part.startswith("models--"):  # the cache of huggingface_hub
            return part.rpartition("--")[2]
    name = str(config.values.get("_name_or_path") or "")
    return name.rpartition("/")[2] or None


@torch.no_grad()
def _read(
    shards: Shards,
    names: dict[str, str],
    adapter: Adapter | None,
    device: torch.device,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Return the weights by our names, on the device."""
    ours = {theirs: name for name, theirs in names.items()}
    weights: dict[str, Tensor] = {}
    for name, stored in shards.tensors(ours):
        kept = dtype or stored.dtype
        tensor = stored.to(device)  # converted there
        if adapter is not None:
            tensor = adapter.merged(name, tensor)
        weights[ours[name]] = tensor.to(kept)
        del stored, tensor  # or they would hold one shard while the next is read
    return weights
