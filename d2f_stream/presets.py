"""Named settings and where they come from. A model's own defaults stand in its manifest."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from d2f_stream.params import GenerationParams

__all__ = ["PRESETS"]

PRESETS: Final[Mapping[str, GenerationParams]] = MappingProxyType(
    {
        # The paper's general setting (arXiv 2508.09192, section 5.1), on this runtime's rules.
        "paper": GenerationParams(),
        # The published decoding loop to the letter, as eval_llada.py of the authors' repository
        # (zhijie-group/Discrete-Diffusion-Forcing, commit 771f745) runs HumanEval.
        "reference": GenerationParams(
            max_new_tokens=512, max_active_blocks=None, stop_at_eos="drain", tail="drop"
        ),
        # One block at a time: block diffusion with a cache, the paper's table 5.
        "single-block": GenerationParams(add_threshold=1.0, max_active_blocks=1),
    }
)
"""Settings by name; a request starts from one with params=PRESETS[name]."""
