"""Trains the byte-level BPE tokenizer of the open-text pair.

Plain merges, unlike the embedded model's, which gives every word of its small task an entry. The
two special tokens have the same ids.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from d2f_export.tokenizer_training import SPECIAL_TOKENS

__all__ = ["train_vocabulary"]


def train_vocabulary(texts: Iterable[str], *, size: int) -> Tokenizer:
    """Train on the texts; equal texts give equal tokenizers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
