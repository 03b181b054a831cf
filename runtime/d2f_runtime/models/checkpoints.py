"""Weights on disk: config.json and model.safetensors, whole or in shards, or a GGUF file.

Two layouts of folders are read. In this project's own, config.json is a `TransformerConfig`,
parameter names are those of `Transformer`, and a tied head is left out. In those of the published
families, config.json has a model_type; see `families`. What is written is the first.
"""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from d2f_runtime.cpus import bound_torch_threads
from d2f_runtime.models.adapters import Adapter
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.draft_adapter import DraftAdapter
from d2f_runtime.models.draft_facts import DraftFacts
from d2f_runtime.models.gguf_weights import GgufWeights
from d2f_runtime.models.stored_weights import (
    CONFIG_FILE,
    EMBEDDING,
    HEAD,
    WEIGHTS_FILE,
    Parameter,
    StoredWeights,
    open_shards,
)
from d2f_runtime.models.transformer import Transformer
from d2f_runtime.quantization.stored import (
    QuantizedLinear,
    QuantizedWeight,
    StoredWeight,
    dense,
    quantise,
)
from d2f_stream.core.errors import UnsupportedModel

__all__ = [
    "StoredAs",
    "load_checkpoint",
    "save_checkpoint",
    "stored_as",
]

logger = logging.getLogger("d2f_stream.checkpoints")

DENSE = ("fp32", "bf16", "fp16")
PROJECTION = "_proj.weight"  # what is quantised: the products of the layers
ROUTER = ".router."  # what keeps fp32: sums in fewer bits choose other experts


def save_checkpoint(folder: Path, model: Transformer, *, dtype: torch.dtype | None = None) -> None:
    """Write the model into `folder`, which is made where needed.

    Args:
        folder: gets config.json and model.safetensors.
        model: the weights; unchanged.
        dtype: of the stored weights; None keeps them as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach()
        .to("cpu", tensor.dtype if ROUTER in name else dtype or tensor.dtype)
        .contiguous()
        for name, tensor in model.state_dict().items()
        if not (name == HEAD and model.config.tie_embeddings)
    }
    save_file(weights, folder / WEIGHTS_FILE)
    text = json.dumps(model.config.to_dict(), indent=2) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def load_checkpoint(
    path: Path,
    *,
    adapter: Path | None = None,
    family: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    quantization: str | None = None,
) -> Transformer:
    """Build a model, tensor by tensor, on the device.

    Everything is checked by the files' headers before the first weight is read. Host memory holds
    no more than the shard, or of a GGUF file the tensor, that is being read, beside the model
    itself where that is the device.

    Args:
        path: of a folder, in this project's layout or a published one, or of a GGUF file.
        adapter: folder of a LoRA adapter to merge; one for drafts is put beside the weights.
        family: which it is, where its files do not tell; see `family_of`.
        device: where the weights go.
        dtype: of the weights; None keeps the stored one, and takes fp32 for a GGUF file's blocks.
        quantization: "nf4" or "int8" for the layers' products, quantised as they come where the
            checkpoint does not hold them so; None makes what is quantised dense.

    Raises:
        ModelNotFound: a folder or one of its files is missing.
        ModelDamaged: a file is truncated, or a tensor is missing, unknown or of the wrong shape.
        UnsupportedModel: config, weights or adapter are not for this build or for each other.
    """
    bound_torch_threads()
    facts = None if adapter is None else DraftFacts.read(adapter)
    stored = StoredWeights.open(path, adapter=adapter if facts is None else None, family=family)
    config, draft = stored.config, None
    if facts is not None and adapter is not None:
        config = facts.adapted(config)
        draft = DraftAdapter.open(adapter, facts, config)
    with torch.device("meta"):
        model = Transformer(config)
    dtype = dtype or stored.shards.dtype
    weights = _read(stored, torch.device(device), dtype, quantization)
    for name, weight in list(weights.items()):
        if not isinstance(weight, Tensor):
            del weights[name]
            _set_quantized(model, name.removesuffix(".weight"), weight)
    if config.tie_embeddings:
        weights[HEAD] = weights[EMBEDDING]
    model.load_state_dict(weights, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    if draft is not None and facts is not None:
        if facts.mask_id is None:
            draft.mask_embedding = model.embed_tokens.weight[config.mask_id].detach().clone()
        model.draft = draft.to(device, model.embed_tokens.weight.dtype)
    if isinstance(stored.shards, GgufWeights) and stored.shards.stored not in DENSE:
        _report(stored.shards, model)
    return model


@dataclass(frozen=True, slots=True)
class StoredAs:
    """What a checkpoint's headers say of its weights.

    Attributes:
        quantization: "nf4", "int8", "fp32", "bf16" or "fp16"; of a GGUF file also Q4_K and the
            like, which are not kept.
        config: of the model.
    """

    quantization: str
    config: TransformerConfig


def stored_as(path: Path, *, family: str | None = None) -> StoredAs:
    """Read how the weights of a folder or a GGUF file are stored; the headers alone.

    Raises:
        ModelError: see `load_checkpoint`.
    """
    config, _, shards = open_shards(path, family=family)
    return StoredAs(shards.stored, config)


@torch.no_grad()
def _read(
    stored: StoredWeights,
    device: torch.device,
    dtype: torch.dtype | None,
    quantization: str | None,
) -> dict[str, StoredWeight]:
    """Return the weights by our names, on the device."""
    shards = stored.shards
    weights: dict[str, StoredWeight] = {}
    for name, held in stored.tensors():
        parameter = stored.parameters[name]
        wanted = quantization if name.endswith(PROJECTION) else None
        beside = shards.quantized.get(parameter.stored)
        kept = torch.float32 if ROUTER in name else dtype or held.dtype
        if beside is None and not _is_adapted(parameter, stored.adapter):
            # Cut out first: of a layer's experts in one tensor, no more than one is copied at once.
            # Copied and converted here in one go: a copy in between can leave a hole in the heap,
            # of each expert.
            here = kept if device.type == "cpu" and wanted is None else None
            held, parameter = parameter.part(held, here), replace(parameter, cut=None)
        tensor = held.to(device)  # converted there
        weight: StoredWeight = tensor
        if beside is not None:
            if wanted not in (None, beside.kind):
                raise UnsupportedModel(
                    f"{shards.path} holds {beside.kind} weights, which are not made {wanted}; "
                    f"load it as {beside.kind}, or fetch the bf16 checkpoint"
                )
            outputs, features = parameter.whole
            weight = shards.quantized_weight(parameter.stored, tensor, (outputs, features))
            kept = dtype or shards.dense_dtype
        weights[name] = _converted(weight, parameter, stored.adapter, kept, wanted)
        del held, tensor, weight  # or they would hold one shard while the next is read
    return weights


def _is_adapted(parameter: Parameter, adapter: Adapter | None) -> bool:
    return adapter is not None and parameter.adapted in adapter.names


def _converted(
    weight: StoredWeight,
    parameter: Parameter,
    adapter: Adapter | None,
    dtype: torch.dtype,
    quantization: str | None,
) -> StoredWeight:
    """Merge the adapter, cut the parameter out, return it dense in `dtype` or quantised."""
    if adapter is not None and _is_adapted(parameter, adapter):
        weight = adapter.merged(parameter.adapted, dense(weight, torch.float32))
    if parameter.cut is not None:
        weight = parameter.part(dense(weight, torch.float32))
    if quantization is None:
        return dense(weight, dtype).to(dtype)
    return quantise(weight, quantization) if isinstance(weight, Tensor) else weight


def _report(weights: GgufWeights, model: Transformer) -> None:
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    logger.info(
        "%s holds its weights as %s in %.0f MiB; its own bits are not kept, in memory they take "
        "%.0f MiB",
        weights.path,
        weights.stored,
        weights.num_bytes / 2**20,
        sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 2**20,
    )


def _set_quantized(model: Transformer, name: str, weight: QuantizedWeight) -> None:
    parent, _, child = name.rpartition(".")
    replaced = model.get_submodule(name)
    assert isinstance(replaced, nn.Linear)
    setattr(model.get_submodule(parent), child, QuantizedLinear(weight, replaced.bias))
