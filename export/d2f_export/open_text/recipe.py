"""The open-text pair: sizes and recipe of the embedded model, another vocabulary; a tiny one.

Two departures. EOS does not stop a continuation: the next document follows, as in training, so that
all continuations are equally long and their figures comparable. And the twin, which sees the same
twenty megabytes of text several times, has one of its inputs in ten hidden, learns from the
prompt's tokens too, and stops after a number of epochs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from d2f_export.embedded import RECIPES, Recipe
from d2f_export.losses import cross_entropy
from d2f_runtime.models.transformer import Transformer

__all__ = ["OPEN_TEXT", "HiddenInputs", "OpenText"]


@dataclass(frozen=True, slots=True)
class OpenText:
    """What the experiment runs.

    Attributes:
        training: sizes and trainings of the pair.
        vocab_size: of the tokenizer to train.
        twin_epochs: after which the twin stops.
        num_texts: held-out texts of the evaluation.
        num_new: tokens of a continuation.
        thresholds: of confidence, see `systems`.
        shares: of the time for each phase; what a phase leaves goes to the later ones.
    """

    training: Recipe
    vocab_size: int
    twin_epochs: int
    num_texts: int
    num_new: int
    thresholds: tuple[float, ...]
    shares: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class HiddenInputs:
    """Cross entropy of every token given those before it, a share of which reads as masks."""

    share: float = 0.1
    frozen: tuple[Transformer, ...] = ()

    def __call__(
        self, model: Transformer, tokens: Tensor, prompt_lens: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the mean loss over all tokens but the first."""
        draw = torch.rand(tokens.shape, generator=generator, device=tokens.device)
        inputs = tokens.masked_fill(draw < self.share, model.config.mask_id)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        hidden, _ = model(inputs, positions, None, causal=True)
        targets = tokens[:, 1:].flatten()
        logits = model.logits(hidden[:, :-1]).flatten(0, 1)
        return cross_entropy(logits, targets, torch.ones_like(targets)) / len(targets)


def _with_vocabulary(recipe: Recipe, size: int) -> Recipe:
    """Return the recipe for a model with so many tokens, none of which ends an answer."""
    config = replace(recipe.config, vocab_size=size, num_tokens=size, eos_ids=())
    return replace(recipe, config=config)


_SHARES: Final = {
    "corpus": 0.08,
    "twin": 0.17,
    "teacher": 0.36,
    "student": 0.24,
    "evaluation": 0.15,
}
_EMBEDDED: Final = _with_vocabulary(RECIPES["embedded"], 4096)

OPEN_TEXT: Final[Mapping[str, OpenText]] = {
    "pair": OpenText(
        training=replace(
            _EMBEDDED,
            twin=replace(_EMBEDDED.twin, tokens_per_batch=49_152, lr=1.5e-3, weight_decay=0.1),
            student=replace(_EMBEDDED.student, tokens_per_batch=65_536),
        ),
        vocab_size=4096,
        twin_epochs=8,
        num_texts=256,
        num_new=160,
        thresholds=(0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99),
        shares=_SHARES,
    ),
    "tiny": OpenText(
        training=_with_vocabulary(RECIPES["tiny"], 512),
        vocab_size=512,
        twin_epochs=1,
        num_texts=4,
        num_new=24,
        thresholds=(0.001,),
        shares=_SHARES,
    ),
}
