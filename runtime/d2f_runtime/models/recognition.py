"""Which family a published model is of: by `model_type`, by the classes of its config, by its name.

A `model_type` can be borrowed: Stable-DiffCoder calls itself "llama". So the classes in
`architectures` and `auto_map` count as well, and what contradicts itself is refused until somebody
says which it is.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from d2f_runtime.models.config_file import ConfigFile
from d2f_runtime.models.families import PUBLISHED, Family, Variant
from d2f_stream.core.errors import UnsupportedModel
from d2f_stream.core.nearest import one_of

__all__ = ["family_of"]

logger = logging.getLogger("d2f_stream.published")

BORROWED: Final = {"StableDiffcoder": "stable-diffcoder", "SeedDiffcoder": "stable-diffcoder"}
"""Beginnings of the names of classes whose configs have another family's model_type."""

ALIASES: Final = {
    "llada2_moe_veomni": ("llada2_moe", None),
    "llada21_moe": ("llada2_moe", "llada2.1"),
}
"""Other names of a model_type, of repositories that train or copy, and the variant of each."""

OWN_CLASSES: Final = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""How the classes of the families begin whose model_type others borrow."""

BLOCK_IN_NAME: Final = re.compile(r"-b(\d{1,4})(?![\w.])", re.IGNORECASE)


def family_of(config: ConfigFile, said: str | None = None) -> Family:
    """Return the family of a model.

    Args:
        config: config.json.
        said: which it is, by somebody who knows: a model_type, or what names a variant of the
            config's; None goes by the files.

    Raises:
        UnsupportedModel: this build does not know it, or the files do not tell.
    """
    model_type = config.values.get("model_type")
    if said is not None and said in PUBLISHED:
        return _variant_of(PUBLISHED[said], config)
    borrower = next((BORROWED[start] for start in BORROWED if _has_class(config, start)), None)
    if borrower is None and said is None:
        _refuse_ambiguous(config, model_type)
    name = borrower or model_type
    if isinstance(name, str) and name in ALIASES:
        name, meant = ALIASES[name]
        said = said or meant
    family = PUBLISHED.get(name) if isinstance(name, str) else None
    if family is None:
        raise UnsupportedModel(
            f"{config.path} has the model_type {model_type!r:.100}, but this build runs "
            f"{', '.join(PUBLISHED)}"
        )
    if said is None:
        return _variant_of(family, config)
    for variant in family.variants:
        if variant.named == said:
            return _as(family, variant)
    names = [*PUBLISHED, *(variant.named for variant in family.variants)]
    raise UnsupportedModel(f"there is no family {said!r:.100}; it must be {one_of(said, names)}")


def _refuse_ambiguous(config: ConfigFile, model_type: object) -> None:
    """Refuse what calls itself an autoregressive model, where its classes do not say the same."""
    if not isinstance(model_type, str) or model_type not in OWN_CLASSES:
        return
    start, others = OWN_CLASSES[model_type], ""
    foreign = [name for name in _classes(config) if not name.startswith(start)]
    if foreign:
        others = f"names the class {foreign[0]:.100}"
    elif any("diffcoder" in place.lower() for place in _places(config)):
        others = "lies under a name of Stable-DiffCoder"
    elif model_type == "llama" and config.path.suffix == ".json" and not any(_classes(config)):
        others = "names no class, as Stable-DiffCoder's may"
    if others:
        raise UnsupportedModel(
            f"{config.path} has the model_type {model_type!r} but {others}: say which it is, with "
            f'family="{model_type}" of load() or family="stable-diffcoder" (--family on the '
            "command line)"
        )


def _has_class(config: ConfigFile, start: str) -> bool:
    return any(name.startswith(start) for name in _classes(config))


def _classes(config: ConfigFile) -> Iterator[str]:
    """Yield the names of the model's classes; not those of its tokenizer."""
    architectures, auto_map = (config.values.get(key) for key in ("architectures", "auto_map"))
    if isinstance(architectures, list):
        yield from (name for name in architectures if isinstance(name, str))
    if isinstance(auto_map, dict):
        for kind, place in auto_map.items():
            if isinstance(place, str) and "Tokenizer" not in str(kind):
                yield place.rpartition(".")[2]


def _variant_of(family: Family, config: ConfigFile) -> Family:
    """Return the family as the model's name tells: of its config, its folder or its repository."""
    places = _places(config)
    for variant in family.variants:
        if any(variant.named in place.lower() for place in places):
            return _as(family, variant)
    if family.prompt_attention == "prompt_grid":
        logger.warning(
            "%s does not tell how the model was trained, and neither does its name: it is run as "
            'bd3lm; family="mdlm" or family="opdlm" of load() says otherwise (--family)',
            config.path,
        )
    named = next((match for place in places if (match := BLOCK_IN_NAME.search(place))), None)
    if named is None or family.prompt_attention != "grid":
        return family
    block_size = int(named[1])
    written = config.values.get("block_size", block_size)
    if written != block_size:
        logger.warning(
            "%s has blocks of %s tokens, but its name says %s; the config is followed",
            *(config.path, written, block_size),
        )
    return replace(family, block_size=max(block_size, 1))


def _places(config: ConfigFile) -> list[str]:
    name = str(config.values.get("_name_or_path") or "")
    places = [name, config.path.parent.name]
    return places + [part for part in config.path.parts if part.startswith("models--")]  # the hub


def _as(family: Family, variant: Variant) -> Family:
    if variant.refused:
        raise UnsupportedModel(f"this build does not run {variant.named}: {variant.refused}")
    return replace(
        family,
        prompt_attention=variant.prompt_attention or family.prompt_attention,
        block_size=variant.block_size or family.block_size,
        defaults=variant.defaults,
    )
