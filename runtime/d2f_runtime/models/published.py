"""A published model without its weights: family, config, and the defaults of a request.

Joins config.json, generation_config.json and the tokenizer's files, or reads all of that from a
GGUF file. Imports no torch, so that a model can be refused before anything heavy is loaded.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec

from d2f_runtime.gguf.file import GgufFile, is_gguf
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.config_file import ConfigFile
from d2f_runtime.models.families import Family
from d2f_runtime.models.gguf_config import gguf_config, has_biases
from d2f_runtime.models.published_config import transformer_config
from d2f_runtime.models.recognition import family_of
from d2f_runtime.text.gguf_tokens import GgufTokens
from d2f_runtime.text.tokenizer_files import TokenizerFiles
from d2f_stream.core.errors import InvalidParams, ModelDamaged, ModelNotFound
from d2f_stream.core.params import GenerationParams
from d2f_stream.core.presets import PRESETS

__all__ = ["Published", "find_published", "is_published", "read_published"]

logger = logging.getLogger("d2f_stream.published")

_SAMPLING: Final[Mapping[str, tuple[object, ...]]] = {
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "min_p": (0,),
    "top_h": (),
    "top_k": (0,),
    "typical_p": (1,),
}
"""What narrows sampling and is not offered here, with the values that ask for nothing."""

_ALWAYS: Final[Mapping[str, tuple[object, ...]]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_length": (20,),  # the default, which transformers writes out
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "remove_invalid_values": (False,),
    "repetition_penalty": (1,),
    "sequence_bias": ({}, []),
    "suppress_tokens": ([],),
    "token_healing": (False,),
    "watermarking_config": ({},),
}
"""The same of what changes greedy answers too."""


@dataclass(frozen=True, slots=True)
class Published:
    """What the files of a published model say.

    Attributes:
        family: of the model.
        config: of the model.
        generation: generation_config.json.
        gguf: the file that holds all of the model; None where that is a folder.
    """

    family: Family
    config: TransformerConfig
    generation: ConfigFile | None = None
    gguf: GgufFile | None = None

    def defaults(self, *, adapted: bool) -> GenerationParams:
        """Return the parameters of a request that gives none.

        Those of generation_config.json (temperature, top_p, max_new_tokens, stop_strings), and
        beneath them the family's. What else it asks for is not done, and logged.

        Args:
            adapted: whether a D2F adapter is merged in.

        Raises:
            ModelDamaged: generation_config.json asks for what is out of range.
        """
        family = self.family
        preset = family.adapted if adapted and family.adapted is not None else family.defaults
        changes: dict[str, Any] = {"block_size": self.config.native_block_size}
        if self.generation is not None:
            changes |= _sampling(self.generation, is_autoregressive=family.is_autoregressive)
        try:
            return msgspec.structs.replace(PRESETS[preset], **changes)
        except InvalidParams as error:
            where = "the model" if self.generation is None else str(self.generation.path)
            raise ModelDamaged(f"{where}: {error!s:.300}") from error


def is_published(config: ConfigFile) -> bool:
    """Whether config.json is a published model's, not this project's own."""
    return "family" not in config and "model_type" in config


def find_published(path: Path, *, family: str | None = None) -> Published | None:
    """Read a published folder or a GGUF file; None where the folder is not a published one.

    Args:
        path: of either.
        family: which it is, where its files do not tell; see `family_of`.

    Raises:
        ModelError: see `read_published`.
    """
    if not is_gguf(path):
        config = ConfigFile.read(path / "config.json")
        if config is None or not is_published(config):
            return None
    return read_published(path, family=family)


def read_published(folder: Path, *, family: str | None = None) -> Published:
    """Read what a published folder, or a GGUF file, says of its model, but not the weights.

    Args:
        folder: or the file.
        family: which it is, where its files do not tell; see `family_of`.

    Raises:
        ModelNotFound: it has no config.json, or there is no such file.
        ModelDamaged: a file is no JSON object, a key is missing or of the wrong kind, or nothing
            names the mask or the EOS.
        UnsupportedModel: the family or one of its options is not known.
    """
    if is_gguf(folder):
        return _read_gguf(GgufFile.open(folder))
    config = ConfigFile.read(folder / "config.json")
    if config is None:
        raise ModelNotFound(f"{folder} has no config.json; is it a model folder?")
    generation = ConfigFile.read(folder / "generation_config.json")
    found = family_of(config, family)
    files = TokenizerFiles(folder)
    return Published(
        family=found,
        config=transformer_config(
            config,
            family=found,
            generation=generation,
            vocabulary=files.vocabulary() if files.complete else None,
        ),
        generation=generation,
    )


def _read_gguf(file: GgufFile) -> Published:
    config = gguf_config(file)
    family = replace(family_of(config), qkv_bias=has_biases(file))
    vocabulary = GgufTokens(file).vocabulary()
    return Published(
        family=family,
        config=transformer_config(config, family=family, generation=None, vocabulary=vocabulary),
        gguf=file,
    )


def _sampling(generation: ConfigFile, *, is_autoregressive: bool) -> dict[str, Any]:
    """Return the fields of GenerationParams that a generation_config.json sets.

    As in transformers, a temperature counts only with do_sample; Dream's own configs, which know no
    do_sample, sample wherever they give a temperature.
    """
    values = generation.values
    changes: dict[str, Any] = {}
    if "max_new_tokens" in generation:
        changes["max_new_tokens"] = generation.integer("max_new_tokens")
    if "stop_strings" in generation:
        stop = values["stop_strings"]
        changes["stop"] = tuple(stop) if isinstance(stop, list) else (stop,)
    samples = generation.flag("do_sample", not is_autoregressive)
    if samples:
        given = "do_sample" in generation
        changes["temperature"] = values.get("temperature", 1.0 if given else 0.0)
        if "top_p" in generation:
            changes["top_p"] = generation.number("top_p")
    wanted = {**_ALWAYS, **(_SAMPLING if samples else {})}
    ignored = [key for key, neutral in wanted.items() if values.get(key) not in (None, *neutral)]
    if ignored:
        shown = ", ".join(f"{key} {values[key]!r:.40}" for key in sorted(ignored))
        logger.warning("%s also asks for %s, which is not done here", generation.path, shown)
    return changes
