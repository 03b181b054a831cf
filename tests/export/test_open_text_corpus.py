"""Open text: what is read, what is kept of it, how it becomes batches."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from d2f_export.corpus import EOS_ID
from d2f_export.open_text.documents import gather
from d2f_export.open_text.pieces import NUM_TOKENS, Pieces, cut, without_copies
from d2f_export.open_text.prose import paragraph_key, paragraphs, sentences
from d2f_export.open_text.sources import find_files, texts
from d2f_export.open_text.text_corpus import TextCorpus
from d2f_export.open_text.vocabulary import train_vocabulary

pytestmark = pytest.mark.torch

PROSE = "The reader returns the next row of the file, or nothing where there is none to be read."
OTHER = "A writer that is closed twice does no harm; it has written what it was given before that."
MODULE = f'''"""{PROSE}

>>> reader.next()

{OTHER}
"""

# {PROSE.replace("reader", "third")}
# It is a comment of more than two lines, and it should be found for that reason.
# Here it ends.

class Reader:
    def read(self):
        if self:
            def inner():
                """{PROSE.replace("row", "inner row")}"""
'''


@pytest.mark.parametrize(
    "text",
    [
        ">>> for the row in the file that is to be read, do what is in the loop below.",
        "| The reader | returns the next row of the file, or nothing where there is none. |",
        "Copyright by the authors of this file, which is given to you as it is and by no other.",
        "Le lecteur rend la ligne suivante du fichier, ou rien du tout quand il n'y en a plus.",
        "Too short a text.",
        "the paragraph that begins in the middle of a sentence is not one that should be kept.",
        "The paragraph that ends in the middle of a sentence is not one that should be kept of",
        "The x[0] = {1: 2, 3: 4} + f(x)[::-1] is the sum of all $a_{ij}$ << 3 | 7 && y in {z}.",
        f"```\n{PROSE}\n```",
        "Ein Satz, der für alle, die ihn lesen, so lang ist, daß er the of and to is in be was.",
    ],
)
def test_what_is_no_english_prose_is_dropped(text: str) -> None:
    assert list(paragraphs(text)) == []


def test_paragraphs_are_unwrapped_and_freed_of_markup() -> None:
    text = """
    Returns the **first** row of :class:`~csv.reader`, as ``dict`` does
    in `the manual <https://example.org>`_, or [nothing](x.md) if there is none to be read.

    * An item of a list that goes on in the next line, which is further right, and
      so it is one paragraph with it.
    """
    assert list(paragraphs(text)) == [
        "Returns the first row of `csv.reader`, as `dict` does in the manual, or nothing if there "
        "is none to be read.",
        "An item of a list that goes on in the next line, which is further right, and so it is one "
        "paragraph with it.",
    ]


def test_sentences_make_the_paragraph_again() -> None:
    text = "It is so, e.g. Here. `x` is next! (A third one.) Version 3.11 is it? So it is."
    assert sentences(text) == [
        "It is so, e.g. Here.",
        "`x` is next!",
        "(A third one.) Version 3.11 is it?",
        "So it is.",
    ]
    assert " ".join(sentences(text)) == text


def test_copies_that_differ_in_names_and_numbers_share_a_key() -> None:
    left = paragraph_key("The BertModel has 12 layers, see `bert.layers`.")
    assert left == paragraph_key("The T5Model has 24 layers, see `t5`.")
    assert left != paragraph_key("The BertModel has 12 heads, see `bert.layers`.")


def test_docstrings_and_comments_are_read_without_importing(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(MODULE + "\nraise SystemExit\n", encoding="utf-8")
    found = [list(paragraphs(text)) for text in texts(path)]
    assert found[0] == [PROSE, OTHER]
    assert found[1] == [PROSE.replace("row", "inner row")]
    assert found[2][0].startswith(PROSE.replace("reader", "third"))


def test_comments_of_headers_are_read(tmp_path: Path) -> None:
    path = tmp_path / "api.h"
    path.write_text(f"/**\n * {PROSE}\n */\nint f();\n// {OTHER}\n//\n// x\n", encoding="utf-8")
    assert [p for text in texts(path) for p in paragraphs(text)] == [PROSE, OTHER]


@pytest.mark.parametrize("content", [b"def broken(:\n", b'"""\xff\xfe"""', b'"""\x00"""'])
def test_files_that_cannot_be_read_are_passed_over(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_bytes(content)
    assert list(texts(path)) == []


def test_a_file_of_two_roots_is_read_once_and_tests_never(tmp_path: Path) -> None:
    for name in ("a/one.py", "a/tests/two.py", "a/readme.md", "a/data.csv"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")
    assert [name for _, name in find_files([tmp_path / "a", tmp_path])] == ["one.py", "readme.md"]


def write_library(folder: Path, number: int) -> None:
    """Write modules of distinct docstrings, and a copy of the first."""
    words = ["row", "table", "queue", "message", "column", "stream", "block", "index"]
    for i in range(number):
        subject, other = words[i % 8], words[i // 8 % 8]
        lines = [
            f"The {subject} number that follows the {other} is read by the {word} when it is time "
            f"for that. It then goes to the next {word}, where all are kept for the {other}."
            for word in words
        ]
        text = "\n\n".join(lines)
        (folder / f"m{i}.py").write_text(f'"""{text}\n"""\n', encoding="utf-8")
    (folder / "z.py").write_text((folder / "m0.py").read_text(encoding="utf-8"), encoding="utf-8")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    write_library(folder, 40)
    return folder


def test_paragraphs_are_kept_once_and_whole_files_held_out(library: Path) -> None:
    gathered = gather([library])
    kept = [p for part in (gathered.train, gathered.held_out) for d in part for p in d]
    assert len(set(map(paragraph_key, kept))) == len(kept)
    assert gathered.num_files == 41
    assert 0 < len(gathered.held_out) < len(gathered.train)
    assert gathered.num_kept == sum(map(len, kept)) < gathered.num_characters


def test_processes_gather_what_one_process_does(library: Path) -> None:
    assert gather([library], num_workers=2) == gather([library])


@pytest.fixture(scope="module")
def tokenizer(library: Path) -> Tokenizer:
    documents = gather([library]).train
    return train_vocabulary(("\n\n".join(document) for document in documents), size=300)


def test_pieces_are_documents_one_after_the_other(library: Path, tokenizer: Tokenizer) -> None:
    documents = gather([library]).train
    pieces = cut(documents, tokenizer)
    whole = "<|endoftext|>".join("\n\n".join(document) for document in documents)
    assert pieces.tokens.shape == (len(pieces), NUM_TOKENS)
    assert pieces.tokens.dtype == np.int16
    for row, prompt_len in zip(pieces.tokens.tolist(), pieces.prompt_lens.tolist(), strict=True):
        assert 32 <= prompt_len <= 64
        text = tokenizer.decode(row, skip_special_tokens=False)
        assert text in whole
        assert text.lstrip()[0].isupper()  # a sentence begins
    assert sum(row.tolist().count(EOS_ID) for row in pieces.tokens) > 0
    first = tokenizer.decode(pieces.tokens[0].tolist(), skip_special_tokens=False)
    assert whole.startswith(first)


def test_too_little_text_for_a_piece_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="fill no piece of 256; read more folders"):
        cut([(PROSE, OTHER)], tokenizer)


def random_pieces(number: int, seed: int = 0) -> Pieces:
    tokens = np.random.default_rng(seed).integers(1, 500, (number, NUM_TOKENS), dtype=np.int16)
    return Pieces(tokens, np.full(number, 40))


def test_held_out_pieces_with_passages_of_training_are_left_out() -> None:
    train, held_out = random_pieces(8, seed=1), random_pieces(3, seed=2)
    held_out.tokens[1, 100:200] = train.tokens[5, 30:130]  # another place in the row
    held_out.tokens[2, 100:116] = train.tokens[5, 30:46]  # one passage is no copy
    kept = without_copies(held_out, train)
    assert (kept.tokens == held_out.tokens[[0, 2]]).all()


def test_pieces_are_read_as_they_were_saved(tmp_path: Path) -> None:
    pieces = random_pieces(3)
    pieces.save(tmp_path / "x.npz")
    again = Pieces.read(tmp_path / "x.npz")
    assert (again.tokens == pieces.tokens).all()
    assert (again.prompt_lens == pieces.prompt_lens).all()


def test_an_epoch_takes_every_piece_once_and_the_next_in_another_order() -> None:
    corpus = TextCorpus(random_pieces(12), seed=3)
    batches = corpus.batches(4 * NUM_TOKENS)
    epochs = [
        np.concatenate([next(batches).tokens for _ in range(corpus.num_batches(4 * NUM_TOKENS))])
        for _ in range(2)
    ]
    assert epochs[0].shape == (12, NUM_TOKENS)
    assert (epochs[0] != epochs[1]).any()
    assert set(map(bytes, epochs[0])) == set(map(bytes, epochs[1]))
    assert len(set(map(bytes, epochs[0]))) == 12


@pytest.mark.parametrize("number", [1, 3, 5])
def test_batches_go_on_from_any_shard(number: int) -> None:
    corpus = TextCorpus(random_pieces(13), seed=3)
    batches = corpus.batches(4 * NUM_TOKENS)
    before = [next(batches) for _ in range(number)]
    resumed = corpus.batches(4 * NUM_TOKENS, first_shard=before[-1].shard)
    for _ in range(4):
        left, right = next(batches), next(resumed)
        assert (left.tokens == right.tokens).all()
        assert left.shard == right.shard
