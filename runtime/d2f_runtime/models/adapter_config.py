"""adapter_config.json: which LoRA adapters can be merged, and how much of each is added where.

Every key that PEFT's LoraConfig has is obeyed, refused by name, or without effect on a merged
weight; docs/models.md has the table.
"""

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from d2f_runtime.models.config_file import ConfigFile
from d2f_runtime.models.draft_facts import ADAPTER_CONFIG_FILE
from d2f_runtime.models.patterns import first_matches
from d2f_stream.core.errors import ModelDamaged, ModelNotFound, UnsupportedModel

__all__ = ["ADAPTER_KEYS", "module_scales", "read_adapter_config", "saved_modules"]

MAX_FLOAT: Final = (2 - 2**-23) * 2.0**127  # of 32 bits

logger = logging.getLogger("d2f_stream.adapters")

_ONLY: Final[Mapping[str, tuple[object, ...]]] = {
    "peft_type": ("LORA",),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None, {}),
    "bias": (None, "none", "all", "lora_only"),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
    "kasa_config": (None, {}),
    "layer_replication": (None, []),
    "lora_bias": (None, False),
    "monteclora_config": (None, {}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "velora_config": (None, {}),
}
"""The values with which an adapter is plain LoRA; others change the base or the forward."""

_OBEYED: Final = (
    "alpha_pattern", "d2f", "exclude_modules", "layers_pattern", "layers_to_transform",
    "lora_alpha", "modules_to_save", "r", "rank_pattern", "target_modules", "use_rslora",
)  # fmt: skip
_WITHOUT_EFFECT: Final = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "fan_in_fan_out", "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
)  # fmt: skip
"""What matters for training, for variants that are refused, or for people."""

ADAPTER_KEYS: Final = frozenset({*_ONLY, *_OBEYED, *_WITHOUT_EFFECT})
"""The keys of adapter_config.json that this build knows; PEFT ignores what it does not know."""


def read_adapter_config(folder: Path) -> ConfigFile:
    """Read a folder's adapter_config.json.

    Raises:
        ModelNotFound: there is none.
        ModelDamaged: it is no JSON object.
        UnsupportedModel: it is no plain LoRA.
    """
    config = ConfigFile.read(folder / ADAPTER_CONFIG_FILE)
    if config is None:
        raise ModelNotFound(f"no {ADAPTER_CONFIG_FILE} in {folder}; is it a LoRA adapter's folder?")
    for key, allowed in _ONLY.items():
        if (value := config.values.get(key)) not in allowed:
            raise UnsupportedModel(
                f"{config.path} asks for {key} {value!r:.100}, but only plain LoRA can be merged"
            )
    if unknown := sorted(config.values.keys() - ADAPTER_KEYS):
        logger.warning("%s has %s, which is not read", config.path, ", ".join(unknown))
    return config


def saved_modules(config: ConfigFile) -> list[str]:
    """Return the modules that the adapter holds whole."""
    return _names(config, "modules_to_save")


def module_scales(config: ConfigFile, ranks: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
    """Return what the product of each module's factors is multiplied by.

    Args:
        config: of the adapter.
        ranks: for each module with factors, the rank of these.

    Raises:
        ModelDamaged: a rank is another one than the config's, or a value is none of its key's.
        UnsupportedModel: the config does not adapt such a module.
    """
    modules = list(ranks)
    _check_targets(config, modules)
    rank_keys = _by_pattern(config, "rank_pattern", modules)
    alpha_keys = _by_pattern(config, "alpha_pattern", modules)
    rank, alpha = config.integer("r", 8), config.number("lora_alpha", 8.0, positive=False)
    scales: dict[str, float] = {}
    for module, rank_key, alpha_key in zip(modules, rank_keys, alpha_keys, strict=True):
        expected = rank
        if rank_key is not None:
            expected = config.section("rank_pattern").integer(rank_key)
        if ranks[module] != (expected,):
            raise ModelDamaged(
                f"{config.path} gives {module} the rank {expected}, but its factors have "
                f"{ranks[module][0] if ranks[module] else 'none'}"
            )
        own = alpha
        if alpha_key is not None:
            own = config.section("alpha_pattern").number(alpha_key, positive=False)
        scale = own / (math.sqrt(expected) if config.flag("use_rslora", False) else expected)
        if abs(scale) > MAX_FLOAT:
            raise ModelDamaged(f"{config.path}: {module} has the alpha {own:g}, beyond any float")
        scales[module] = scale
    return scales


def _by_pattern(config: ConfigFile, key: str, modules: Sequence[str]) -> list[str | None]:
    """Return for each module the first pattern that its name ends with, as PEFT does."""
    patterns = list(config.section(key).values)
    found = first_matches(patterns, modules, r"(.*\.)?({})$", f"{config.path}: {key}")
    return [None if index is None else patterns[index] for index in found]


def _check_targets(config: ConfigFile, modules: Sequence[str]) -> None:
    """Refuse factors of modules that the config does not adapt: PEFT would pass over them."""
    left_out = {module for module in modules if not _is_in_layers(config, module)}
    targets = config.values.get("target_modules")
    if targets is not None and targets != "all-linear":
        left_out |= set(modules) - _named(config, "target_modules", modules)
    left_out |= _named(config, "exclude_modules", modules)
    if left_out:
        raise UnsupportedModel(
            f"{config.path} does not adapt {min(left_out)} (target_modules, exclude_modules, "
            "layers_to_transform), but the adapter has factors of it"
        )


def _named(config: ConfigFile, key: str, modules: Sequence[str]) -> set[str]:
    """Return the modules that a key names: by an expression, or by a list of ends of names."""
    value = config.values.get(key)
    if isinstance(value, str):
        found = first_matches([value], modules, r"(?:{})\Z", f"{config.path}: {key}")
        return {module for module, index in zip(modules, found, strict=True) if index is not None}
    ends = tuple(f".{name}" for name in _names(config, key))
    return {module for module in modules if f".{module}".endswith(ends)}


def _is_in_layers(config: ConfigFile, module: str) -> bool:
    """Whether a module lies in `layers_to_transform`, which counts with a list of targets only."""
    layers = config.values.get("layers_to_transform")
    if layers in (None, []) or isinstance(config.values.get("target_modules"), str):
        return True
    wanted = layers if isinstance(layers, list) else [layers]
    if not all(isinstance(layer, int) for layer in wanted):
        raise ModelDamaged(f"{config.path}: layers_to_transform is {layers!r:.100}")
    pattern = config.values.get("layers_pattern") or []
    parents = [pattern] if isinstance(pattern, str) else _names(config, "layers_pattern")
    *above, _ = module.split(".")
    for parent, number in itertools.pairwise(above):
        if number.isdecimal() and (not parents or parent in parents):
            return int(number[:9]) in wanted
    return False


def _names(config: ConfigFile, key: str) -> list[str]:
    value = config.values.get(key, [])
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ModelDamaged(f"{config.path}: {key} is {value!r:.100} but must be a list of names")
    return value
