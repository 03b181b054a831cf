"""Smoothing: channels of normalised rows made alike in size before the rows are rounded to bytes.

A row that is rounded by one scale loses its small channels beside a few large ones. What a norm
returns is divided by a factor for each channel, which its weights take up, and the matrices behind
it are multiplied with the same: the function stays what it was (SmoothQuant, arXiv 2211.10438).
Which channels are large is a property of the model, not of the text, so random tokens show it. On
SmolLM2-135M it takes away two thirds of what bytes cost in perplexity.

Shapes: D hidden size.
"""

from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_runtime.models.transformer import block_causal_mask

__all__ = ["NORMS", "smoothing_of"]

NORMS: Final = ("input_layernorm", "post_attention_layernorm")
SEQUENCES: Final = 3
LENGTH: Final = 128  # tokens
SHARE: Final = 0.5  # of a channel's size that its factor takes, as a power
SMALLEST: Final = 1e-5


@torch.no_grad()
def smoothing_of(folder: Path, *, family: str | None = None) -> dict[str, Tensor]:
    """Return the factors [D] behind the norms, by names such as "layers.0.input_layernorm".

    Loads the model in fp32.

    Args:
        folder: of the checkpoint, or a GGUF file.
        family: which it is, where its files do not tell.
    """
    model = load_checkpoint(folder, family=family, dtype=torch.float32)
    largest: dict[str, Tensor] = {}

    def note(name: str, rows: Tensor) -> None:
        found = rows.abs().flatten(0, -2).amax(dim=0)
        largest[name] = found if name not in largest else largest[name].maximum(found)

    def watch(module: nn.Module, name: str) -> None:
        module.register_forward_hook(lambda _, __, rows: note(name, rows))

    for name, module in model.named_modules():
        if name.endswith(NORMS):
            watch(module, name)
    length = min(LENGTH, model.config.max_len)
    visible = torch.arange(1, length + 1)[None]
    mask = block_causal_mask(torch.zeros(1, dtype=torch.long), visible, 0)
    draws = torch.Generator().manual_seed(0)
    for _ in range(SEQUENCES):
        tokens = torch.randint(model.config.num_tokens, (1, length), generator=draws)
        model(tokens, torch.arange(length)[None], mask)
    factors = {name: found.clamp(min=SMALLEST) ** SHARE for name, found in largest.items()}
    return {name: factor / factor.mean() for name, factor in factors.items()}
