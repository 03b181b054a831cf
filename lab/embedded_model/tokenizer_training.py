"""Training of the byte-level BPE tokenizer of the embedded model, on word problems.

Owns the vocabulary: 1024 entries, of which two are special, 256 are the bytes, so that any text can
be encoded, and the rest are every word of the problems and the commonest merges. A digit is always
one token and takes the space before it along, so " 42" is two tokens and not three. Questions and
answers are separate texts: a model's input is the ids of the one followed by those of the other.
"""

import json
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from typing import Final

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from lab.embedded_model.problems import problems

END_OF_TEXT: Final = "<|endoftext|>"  # id 0
MASK: Final = "<|mask|>"  # id 1
SPECIAL_TOKENS: Final = (END_OF_TEXT, MASK)


def train_tokenizer(*, seed: int, num_problems: int = 10_000, vocab_size: int = 1024) -> Tokenizer:
    """Train on questions and answers of the training split; equal seeds give equal tokenizers."""
    texts = [
        text
        for problem in islice(problems(seed, split="train"), num_problems)
        for text in (problem.question, problem.answer)
    ]
    merges = _train_merges(texts, vocab_size)
    vocabulary, num_merges = _vocabulary(_words(texts), merges, vocab_size)
    # NOTE: ignore_merges takes a word that is in the vocabulary as it is. Plain BPE would spend a
    # third of the entries on the fragments that its merges pass through on the way to a word.
    tokenizer = _with_pipeline(
        models.BPE(vocab=vocabulary, merges=merges[:num_merges], ignore_merges=True)
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _with_pipeline(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{N}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _train_merges(texts: Iterable[str], vocab_size: int) -> list[tuple[str, str]]:
    tokenizer = _with_pipeline(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=_alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]


def _words(texts: Iterable[str]) -> list[str]:
    """List the pre-tokens of more than one byte, the commonest first."""
    splitter = _with_pipeline(models.BPE()).pre_tokenizer
    counts = Counter(piece for text in texts for piece, _ in splitter.pre_tokenize_str(text))
    by_count = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [piece for piece, _ in by_count if len(piece) > 1]


def _vocabulary(
    words: list[str], merges: list[tuple[str, str]], vocab_size: int
) -> tuple[dict[str, int], int]:
    """Number specials, bytes, words and as many merges as there is room for; count the merges."""
    tokens = dict.fromkeys((*SPECIAL_TOKENS, *_alphabet(), *words))
    if len(tokens) > vocab_size:
        raise ValueError(f"{len(tokens)} words and bytes do not fit; raise vocab_size {vocab_size}")
    num_merges = 0
    for left, right in merges:
        if len(tokens) == vocab_size and left + right not in tokens:
            break
        tokens[left + right] = None
        num_merges += 1
    return {token: index for index, token in enumerate(tokens)}, num_merges


def _alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())
