"""StoredWeights: which tensor on disk each parameter of a model is, checked by the files' headers.

Joins config, shards, the names of the family and an adapter, and decides what a tied head is. Reads
no weight, except to compare a head that is stored beside the embedding which it is tied to.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from d2f_runtime.gguf.file import is_gguf
from d2f_runtime.models.adapters import Adapter
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.config_file import ConfigFile
from d2f_runtime.models.gguf_weights import GgufWeights
from d2f_runtime.models.layouts import Cut, Layout, Place, place_of
from d2f_runtime.models.published import Published, find_published
from d2f_runtime.models.shards import Shards
from d2f_runtime.models.transformer import Transformer
from d2f_stream.core.errors import ModelDamaged, ModelNotFound, UnsupportedModel

__all__ = [
    "CONFIG_FILE",
    "EMBEDDING",
    "HEAD",
    "WEIGHTS_FILE",
    "Parameter",
    "StoredWeights",
    "open_shards",
    "read_config",
]

logger = logging.getLogger("d2f_stream.checkpoints")

CONFIG_FILE: Final = "config.json"
WEIGHTS_FILE: Final = "model.safetensors"
EMBEDDING: Final = "embed_tokens.weight"
HEAD: Final = "lm_head.weight"
STACKED: Final = ".mlp.experts.gate_proj"  # the experts of a layer in one tensor


@dataclass(frozen=True, slots=True)
class Parameter:
    """Where a parameter comes from.

    Attributes:
        stored: the tensor on disk.
        adapted: what an adapter calls it; another name where a head is stored as the embedding.
        shape: that the config asks for.
        cut: which part of the tensor it is; None is all.
    """

    stored: str
    adapted: str
    shape: tuple[int, ...]
    cut: Cut | None = None

    @property
    def whole(self) -> tuple[int, ...]:
        """Shape of the tensor on disk."""
        return self.shape if self.cut is None else self.cut.whole

    def part(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return what the parameter is of the tensor; what is cut out, in a dtype or in its own."""
        return tensor if self.cut is None else self.cut.of(tensor, self.shape[0], dtype)


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """A model's parameters on disk.

    Attributes:
        config: of the model; its head is tied only where it is the embedding indeed.
        shards: the tensors.
        parameters: by our names; a tied head has none of its own.
        adapter: to be merged.
    """

    config: TransformerConfig
    shards: Shards | GgufWeights
    parameters: dict[str, Parameter]
    adapter: Adapter | None

    @classmethod
    def open(
        cls, path: Path, *, adapter: Path | None = None, family: str | None = None
    ) -> "StoredWeights":
        """Check the weights of a folder or a GGUF file, and an adapter's, by their headers.

        Args:
            path: of either.
            adapter: folder of a LoRA adapter.
            family: which it is, where its files do not tell; see `family_of`.

        Raises:
            ModelNotFound: a folder or one of its files is missing.
            ModelDamaged: a file is truncated, or a tensor is missing, unknown or of the wrong
                shape.
            UnsupportedModel: config, weights or adapter are not for this build or for each other.
        """
        config, published, shards = open_shards(path, family=family)
        layout = None if published is None else _layout(published.family.layout, shards)
        _check_number(path, config, layout, shards)
        with torch.device("meta"):
            shapes = {
                name: tuple(tensor.shape)
                for name, tensor in Transformer(config).state_dict().items()
            }
        places = {
            name: Place(name) if layout is None else place_of(layout, name, shape, config)
            for name, shape in shapes.items()
        }
        names = {name: place.name for name, place in places.items()}
        wholes = {
            name: shapes[name] if place.cut is None else place.cut.whole
            for name, place in places.items()
        }
        theirs = {place.name: wholes[name] for name, place in places.items()}
        stored = dict(names)
        if config.tie_embeddings:
            config, stored = _untied(config, shards, stored)
        expected = {stored[name]: shape for name, shape in wholes.items() if name in stored}
        shards.check(expected, ignored={names[HEAD], names[EMBEDDING]})
        merge = None if adapter is None else _open_adapter(adapter, path, theirs)
        if merge is not None and config.tie_embeddings:
            config, stored = _untied_by(merge, config, names, stored)
        return cls(
            config,
            shards,
            {
                name: Parameter(stored[name], names[name], shapes[name], places[name].cut)
                for name in stored
            },
            merge,
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield our names and what is stored, in host memory and file by file; see `Shards`."""
        ours: dict[str, list[str]] = {}
        for name, parameter in self.parameters.items():
            ours.setdefault(parameter.stored, []).append(name)
        for stored, tensor in self.shards.tensors(ours):
            for name in ours[stored]:
                yield name, tensor
            del tensor  # or it would hold one shard while the next is read


def open_shards(
    path: Path, *, family: str | None = None
) -> tuple[TransformerConfig, Published | None, Shards | GgufWeights]:
    """Read config and headers of a folder or a GGUF file, without comparing them.

    Raises:
        ModelNotFound, ModelDamaged, UnsupportedModel: as `StoredWeights.open`.
    """
    published = find_published(path, family=family)
    if published is None:
        return _own_config(path), None, Shards.open(path, WEIGHTS_FILE)
    if published.gguf is None:
        return published.config, published, Shards.open(path, WEIGHTS_FILE)
    weights = GgufWeights(published.gguf, head_dim=published.config.head_dim)
    return published.config, published, weights


def read_config(path: Path, *, family: str | None = None) -> TransformerConfig:
    """Read a model's config; of a published one, also what names its mask and EOS.

    Args:
        path: of a folder or a GGUF file.
        family: which it is, where its files do not tell; see `family_of`.

    Raises:
        ModelNotFound: no such folder or file.
        ModelDamaged: the file is not a JSON object, or nothing names the mask or the EOS.
        UnsupportedModel: it is of a family or holds a key that this build does not know, or lacks
            one.
    """
    published = find_published(path, family=family)
    return _own_config(path) if published is None else published.config


def _own_config(folder: Path) -> TransformerConfig:
    if not folder.is_dir():
        raise ModelNotFound(f"no model folder at {folder}")
    file = ConfigFile.read(folder / CONFIG_FILE)
    if file is None:
        raise ModelNotFound(f"{folder} has no {CONFIG_FILE}; is it a model folder?")
    return TransformerConfig.from_dict(file.values)


def _layout(layout: Layout, shards: Shards | GgufWeights) -> Layout:
    """Return the layout by the tensors that are there: experts may be stacked by layer."""
    if layout != "llada2" or not isinstance(shards, Shards):
        return layout
    stacked = any(name.endswith(STACKED) for name in shards.headers)
    return "llada2-merged" if stacked else layout


def _check_number(
    path: Path, config: TransformerConfig, layout: Layout | None, shards: Shards | GgufWeights
) -> None:
    """Hold the numbers of layers and experts against the tensors, before these are laid out."""
    found = f"{shards.path} has {shards.num_tensors} tensors"
    if config.num_layers > shards.num_tensors:
        raise ModelDamaged(f"{path} asks for {config.num_layers} layers, but {found}")
    if config.mixture is None:
        return
    number = config.mixture.num_experts
    if layout == "llada2-merged" and isinstance(shards, Shards):
        stacks = (h.shape for name, h in shards.headers.items() if name.endswith(STACKED))
        if (most := next(stacks)[0]) != number:
            raise ModelDamaged(
                f"{path} asks for {number} experts, but {shards.path} has {most} in a layer"
            )
    elif number > shards.num_tensors:
        raise ModelDamaged(f"{path} asks for {number} experts, but {found}")


def _untied(
    config: TransformerConfig, shards: Shards | GgufWeights, stored: dict[str, str]
) -> tuple[TransformerConfig, dict[str, str]]:
    """Return the config and the tensors of a model whose config ties the head to the embedding.

    As in transformers: where one of the two is stored it is both, and where both are and differ,
    the config is wrong.
    """
    head, embedding = stored[HEAD], stored[EMBEDDING]
    if not shards.holds(embedding) and shards.holds(head):
        stored = stored | {EMBEDDING: head}
    elif shards.holds(embedding) and shards.holds(head) and not shards.same(embedding, head):
        logger.warning(
            "%s holds a head that is not the embedding, although the config ties them; both are "
            "read as they are",
            shards.path,
        )
        return replace(config, tie_embeddings=False), stored
    return config, {name: tensor for name, tensor in stored.items() if name != HEAD}


def _untied_by(
    adapter: Adapter, config: TransformerConfig, names: dict[str, str], stored: dict[str, str]
) -> tuple[TransformerConfig, dict[str, str]]:
    """Return the config and the tensors of a tied model once an adapter has been merged.

    An embedding or a head that the adapter holds whole is tied no more. To one that it adds to,
    PEFT adds in one place while the adapter is apart, and in both once it is merged.
    """
    tied = {names[HEAD], names[EMBEDDING]}
    if both := sorted(tied & adapter.factored):
        raise UnsupportedModel(
            f"the adapter adds to {both[0]}, but the model's embedding is its head as well; merge "
            "it with PEFT, or untie the model"
        )
    if not tied & adapter.replaced:
        return config, stored
    return replace(config, tie_embeddings=False), stored | {HEAD: stored[EMBEDDING]}


def _open_adapter(folder: Path, base: Path, parameters: dict[str, tuple[int, ...]]) -> Adapter:
    if not folder.is_dir():
        raise ModelNotFound(f"no adapter folder at {folder}")
    adapter = Adapter.open(folder, parameters)
    name = _published_as(base)
    if name is not None and name != adapter.base.rpartition("/")[2]:  # such as Base and Instruct
        logger.warning("%s was made for %s, but is merged into %s", folder, adapter.base, name)
    return adapter


def _published_as(path: Path) -> str | None:
    """Return the name of a model's repository, where its folder or its config tells."""
    for part in path.parts:
        if part.startswith("models--"):  # the cache of huggingface_hub
            return part.rpartition("--")[2]
    config = None if is_gguf(path) else ConfigFile.read(path / CONFIG_FILE)
    name = "" if config is None else str(config.values.get("_name_or_path") or "")
    return name.rpartition("/")[2] or None
