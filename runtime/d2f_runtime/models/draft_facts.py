"""DraftFacts: what the config of a draft adapter says of it. Imports no torch.

The folder is a LoRA adapter's in PEFT's layout; what makes it a draft adapter is the block "d2f" in
adapter_config.json, {"kind": "draft", "mask_id": 3, "block_sizes": [4, 8, 16]}. The one that is
published with Nemotron-Labs-Diffusion (linear_spec_lora) has no such block: it is told by its
name or its base's, and by what it adapts, which is the output projection alone.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec

from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.config_file import ConfigFile
from d2f_stream.core.errors import ModelDamaged, UnsupportedModel
from d2f_stream.core.params import GenerationParams
from d2f_stream.core.presets import PRESETS

__all__ = ["ADAPTER_CONFIG_FILE", "DraftFacts"]

ADAPTER_CONFIG_FILE: Final = "adapter_config.json"
LINEAR_SPEC: Final = "linear_spec_lora"


@dataclass(frozen=True, slots=True)
class DraftFacts:
    """What a draft adapter's config says of itself.

    Attributes:
        mask_id: of the mask, whose row the adapter has, not the base; None is the base's own.
        block_sizes: that it was trained for, ascending; () is the base's own.
    """

    mask_id: int | None
    block_sizes: tuple[int, ...]

    @classmethod
    def read(cls, folder: Path) -> "DraftFacts | None":
        """Read an adapter's config; None where it is to be merged.

        Raises:
            ModelDamaged: a key is missing or of the wrong kind.
            UnsupportedModel: it is of another kind than this build knows.
        """
        config = ConfigFile.read(folder / ADAPTER_CONFIG_FILE)
        if config is None:
            return None
        if "d2f" not in config:
            return cls(None, ()) if _is_linear_spec(config) else None
        about = config.section("d2f")
        kind = about.values.get("kind")
        if kind != "draft":
            raise UnsupportedModel(
                f"{config.path} has an adapter of the kind {kind!r:.100}, but this build runs "
                "'draft', and merges adapters without a kind"
            )
        mask_ids, sizes = about.ids("mask_id"), about.ids("block_sizes")
        if len(mask_ids) != 1 or not sizes or not all(sizes):
            raise ModelDamaged(f"{config.path}: d2f needs one mask_id and the block_sizes")
        return cls(mask_ids[0], tuple(sorted(sizes)))

    def adapted(self, base: TransformerConfig) -> TransformerConfig:
        """Return the config of a base that drafts with the adapter.

        Raises:
            UnsupportedModel: the base is not of the adapter's kind.
        """
        if (self.mask_id is None) != base.drafts_in_place:
            needed = "one that drafts in place" if self.mask_id is None else "an autoregressive one"
            raise UnsupportedModel(
                f"the draft adapter is for another model than this {base.family}: for {needed}"
            )
        if self.mask_id is None:
            return base
        if not base.shift_logits or base.prompt_attention != "causal":
            raise UnsupportedModel(
                f"a draft adapter is for an autoregressive model, but the base is a {base.family} "
                f"with {base.prompt_attention} attention"
            )
        if base.mixture is not None:
            raise UnsupportedModel("a draft adapter is not for a mixture of experts")
        return replace(
            base,
            mask_id=self.mask_id,
            native_block_size=self.block_sizes[-1],
            max_block_size=self.block_sizes[-1],
            commit_attention="causal",
        )

    def defaults(self, base: GenerationParams) -> GenerationParams:
        """Return the parameters of a request that gives none, from those of the base.

        How blocks are decoded is the preset's "verified"; lengths and sampling stay the base's.
        """
        preset = PRESETS["verified"]
        if not self.block_sizes:
            preset = msgspec.structs.replace(preset, block_size=base.block_size)
        fitting = [size for size in self.block_sizes if size <= preset.block_size]
        return msgspec.structs.replace(
            preset,
            block_size=max(fitting, default=min(self.block_sizes, default=preset.block_size)),
            max_new_tokens=base.max_new_tokens,
            temperature=base.temperature,
            top_p=base.top_p,
            seed=base.seed,
            stop=base.stop,
        )


def _is_linear_spec(config: ConfigFile) -> bool:
    """Whether a LoRA is the one that Nemotron-Labs-Diffusion switches on for drafts alone."""
    targets = config.values.get("target_modules")
    base = str(config.values.get("base_model_name_or_path") or "")
    named = LINEAR_SPEC in config.path.parent.name or "Nemotron-Labs-Diffusion" in base
    return named and targets in (["o_proj"], "o_proj")
