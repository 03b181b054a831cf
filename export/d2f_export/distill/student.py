"""The student's trainable weights: a LoRA over the frozen base, by peft, or all weights.

With a LoRA the base is there once: with the adapters off it is the teacher. The adapter is stored
in PEFT's format under the module names of the base's own checkpoint, so that PEFT loads it over
the published class and this runtime merges it (`load(model, adapter=...)`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from d2f_export.distill.whole_files import write_peft
from d2f_runtime.models.layouts import Layout, published_name
from d2f_runtime.models.transformer import Transformer
from d2f_stream.core.errors import MissingExtra

__all__ = ["TARGETS", "adapters_off", "add_lora", "save_adapter", "trainable"]

TARGETS: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
ADAPTER: Final = "default"  # PEFT's name of an only adapter


def add_lora(model: Transformer, *, rank: int, alpha: float, dropout: float) -> None:
    """Freeze the model and give its attention projections trainable fp32 adapters.

    The new factors are drawn from torch's global generator; the model computes the same as before.

    Raises:
        MissingExtra: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingExtra("a LoRA student", "peft", "export") from error
    model.requires_grad_(False)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(TARGETS)
    )
    inject_adapter_in_model(config, model, ADAPTER)
    for parameter in trainable(model).values():
        parameter.data = parameter.data.float()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that the optimiser changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run the model without its adapters: the teacher."""
    layers = _lora_layers(model)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save_adapter(
    folder: Path,
    factors: Mapping[str, Tensor],
    *,
    layout: Layout | None,
    base: str,
    alpha: float,
    dropout: float,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors; the config last.

    Args:
        folder: made where needed; files of these names are replaced whole.
        factors: of `trainable`.
        layout: of the base's checkpoint; None is this project's own.
        base: the name that the adapter gives its base.
        alpha: see add_lora.
        dropout: see add_lora.
    """
    from peft import LoraConfig

    weights: dict[str, Tensor] = {}
    modules: set[str] = set()
    rank = 0
    for name, factor in factors.items():
        ours, _, side = name.partition(".lora_")
        theirs = ours if layout is None else published_name(layout, f"{ours}.weight")
        theirs = theirs.removesuffix(".weight")
        modules.add(theirs.rpartition(".")[2])
        stored = factor.detach().to("cpu", torch.float32).contiguous()
        weights[f"base_model.model.{theirs}.lora_{side[0]}.weight"] = stored
        if side[0] == "A":
            rank = len(stored)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=sorted(modules),
        base_model_name_or_path=base,
        inference_mode=True,
    ).to_dict()
    write_peft(folder, weights, _plain(config))


def _lora_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _plain(value: Any) -> Any:
    """Return JSON-ready values: PEFT's configs hold sets and enums."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, set | list | tuple):
        return sorted(map(_plain, value)) if isinstance(value, set) else [_plain(i) for i in value]
    return getattr(value, "value", value)
