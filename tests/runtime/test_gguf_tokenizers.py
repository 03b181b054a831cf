"""Tokenizers in GGUF files against transformers' own and those that models are published with."""

import random
from pathlib import Path
from typing import Any

import pytest

from d2f_runtime.gguf.file import GgufFile
from d2f_runtime.text.gguf_tokens import GgufTokens
from d2f_runtime.text.tokenizer import Tokenizer, token_source
from d2f_stream.core.errors import D2FError, ModelDamaged, UnsupportedModel

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
from tiny_gguf import (  # noqa: E402
    CONTROL,
    DEFINED,
    TEMPLATE,
    random_text,
    tokens_of,
    vocabulary,
    write_tokens,
)

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(0)
    return [random_text(rng) for _ in range(10_000)]


def published(pre: str) -> Any:
    """Return the tokenizer of the model that a pre-tokenizer is named after, with our tokens."""
    tokens, merges = vocabulary()
    vocab = {text: index for index, text in enumerate(tokens)}
    pairs = [tuple(pair.split(" ")) for pair in merges]
    parts = tokenizers.pre_tokenizers
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, pairs, ignore_merges=pre == "llama-bpe")
    )
    byte_level = parts.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
    match pre:
        case "gpt-2":
            made.pre_tokenizer = byte_level
        case "smollm":  # tokenizer.json of SmolLM2-135M-Instruct
            made.pre_tokenizer = parts.Sequence([parts.Digits(individual_digits=True), byte_level])
        case "llama-bpe":  # tokenizer.json of Llama-3.1-8B
            cut = tokenizers.Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            )
            made.pre_tokenizer = parts.Sequence([parts.Split(cut, "isolated"), byte_level])
        case "qwen2":
            return transformers.Qwen2Tokenizer(
                vocab=vocab,
                merges=pairs,
                extra_special_tokens=list(CONTROL),
                unk_token="<|endoftext|>",
                pad_token="<|endoftext|>",
                eos_token="<|im_end|>",
            )
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(list(CONTROL))
    made.add_tokens(list(DEFINED))
    return made


def ids_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if isinstance(tokenizer, tokenizers.Tokenizer):
        found = tokenizer.encode_batch(texts, add_special_tokens=False)
        return [encoding.ids for encoding in found]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_ids_of_10000_texts_are_those_of_the_published_tokenizer(
    tmp_path: Path, texts: list[str], pre: str
) -> None:
    ours = Tokenizer.from_folder(write_tokens(tmp_path / "tiny.gguf", pre=pre))
    theirs = published(pre)
    if pre == "qwen2":
        theirs.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in DEFINED])
    wanted = ids_of(theirs, texts)
    for text, ids in zip(texts, wanted, strict=True):
        assert ours.encode(text) == ids, text
    for ids in wanted[:1000]:
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe"])
def test_ids_of_10000_texts_are_those_of_transformers_own_reading(
    tmp_path: Path, texts: list[str], pre: str
) -> None:
    path = write_tokens(tmp_path / "tiny.gguf", pre=pre)
    ours = Tokenizer.from_folder(path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text, ids in zip(texts, ids_of(theirs, texts), strict=True):
        assert ours.encode(text) == ids, text


DEFAULT = {  # of unicode_regex_split in llama.cpp, as in llama-cpp-python 0.3.36
    "a1234567": ["a", "123", "456", "7"],
    "x+=2": ["x", "+=", "2"],
    "it's $5.": ["it", "'", "s", "Ġ", "$", "5", "."],
}


@pytest.mark.parametrize("text", DEFAULT)
def test_default_words_are_llama_cpps(tmp_path: Path, text: str) -> None:
    path = write_tokens(tmp_path / "tiny.gguf", pre="default")
    words = GgufTokens(GgufFile.open(path)).build().pre_tokenizer.pre_tokenize_str(text)
    assert [word for word, _ in words] == DEFAULT[text]


def test_file_that_names_no_words_gets_the_default_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    named = Tokenizer.from_folder(write_tokens(tmp_path / "named.gguf", pre="default"))
    assert caplog.text == ""
    unnamed = Tokenizer.from_folder(write_tokens(tmp_path / "unnamed.gguf", pre=None))
    assert "does not say how it cuts text into words" in caplog.text
    assert unnamed.encode("it's 12345") == named.encode("it's 12345")


def test_word_that_is_a_token_stays_one_for_llama3_alone(tmp_path: Path) -> None:
    tokens, merges = vocabulary()
    word = "quickly"
    assert word not in tokens
    changes = {
        "tokenizer.ggml.tokens": [*tokens, word],
        "tokenizer.ggml.token_type": [1] * (len(tokens) + 1),
        "tokenizer.ggml.merges": merges,
    }
    for pre, alone in (("llama-bpe", True), ("gpt-2", False)):
        path = write_tokens(tmp_path / f"{pre}.gguf", pre=pre, metadata=changes)
        assert (Tokenizer.from_folder(path).encode(word) == [len(tokens)]) == alone


def test_special_tokens_are_read_whole_and_left_out_of_texts(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_tokens(tmp_path / "tiny.gguf"))
    start, end, think = tokens_of("<|im_start|>", "<|im_end|>", "<think>")
    ids = tokenizer.encode("<|im_start|><think>\n<|im_end|>")
    assert (ids[0], ids[1], ids[-1]) == (start, think, end)
    assert tokenizer.decode(ids) == "<think>\n"
    assert tokenizer.special_names == {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }


def test_chat_template_is_the_files(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    tokenizer = Tokenizer.from_folder(write_tokens(tmp_path / "tiny.gguf"))
    wanted = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render(messages) == wanted
    without = {"tokenizer.chat_template": None}
    bare = Tokenizer.from_folder(write_tokens(tmp_path / "bare.gguf", metadata=without))
    with pytest.raises(D2FError, match="no chat template"):
        bare.render(messages)


def test_template_that_cannot_be_read_is_the_files(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tiny.gguf", metadata={"tokenizer.chat_template": "{% for %}"})
    with pytest.raises(ModelDamaged, match=r"the chat template of .*tiny\.gguf cannot be read"):
        Tokenizer.from_folder(path)


def test_unused_tokens_are_no_ids(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tiny.gguf", unused=7)
    assert token_source(path).vocabulary().size == len(vocabulary()[0])
    types = [1] * len(vocabulary()[0])
    types[7] = 5
    path = write_tokens(path, metadata={"tokenizer.ggml.token_type": types})
    assert token_source(path).vocabulary().gaps(500) == (7,)


def test_written_files_make_the_same_tokenizer(tmp_path: Path, texts: list[str]) -> None:
    path = write_tokens(tmp_path / "tiny.gguf", pre="smollm")
    token_source(path).write(tmp_path)
    ours, copied = Tokenizer.from_folder(path), Tokenizer.from_folder(tmp_path)
    assert copied.special_names == ours.special_names
    assert (tmp_path / "chat_template.jinja").read_text() == TEMPLATE
    for text in texts[:2000]:
        ids = ours.encode(text)
        assert copied.encode(text) == ids
        assert copied.decode(ids) == ours.decode(ids)


@pytest.mark.parametrize(
    ("key", "value", "kind", "says"),
    [
        ("model", "llama", UnsupportedModel, r"the model 'llama', but .* 'gpt2'"),
        ("model", None, UnsupportedModel, "the model None"),
        ("pre", "tekken", UnsupportedModel, "words as 'tekken', but this build knows default, gpt"),
        ("pre", 7, UnsupportedModel, "words as 7"),
        ("tokens", None, ModelDamaged, r"no tokenizer\.ggml\.tokens"),
        ("tokens", [1, 2], ModelDamaged, r"no tokenizer\.ggml\.tokens"),
        ("tokens", ["a", "a"], ModelDamaged, "but not a type for each"),
        ("token_type", [1, 1], ModelDamaged, "but not a type for each"),
        ("token_type", "normal", ModelDamaged, "but not a type for each"),
        ("merges", ["a b c"], ModelDamaged, "not a BPE vocabulary"),
        ("merges", ["zzz qqq"], ModelDamaged, "not a BPE vocabulary"),
        ("merges", None, ModelDamaged, r"no tokenizer\.ggml\.merges"),
        ("eos_token_id", 1 << 20, ModelDamaged, "eos_token_id is 1048576, but there are"),
        ("eos_token_id", "end", ModelDamaged, "eos_token_id is 'end', but there are"),
    ],
)
def test_tokenizer_that_cannot_be_read(
    tmp_path: Path,
    key: str,
    value: object,
    kind: type[D2FError],
    says: str,
) -> None:
    path = write_tokens(tmp_path / "tiny.gguf", metadata={f"tokenizer.ggml.{key}": value})
    with pytest.raises(kind, match=says) as caught:
        Tokenizer.from_folder(path)
    assert str(path) in str(caught.value)


def test_token_that_occurs_twice(tmp_path: Path) -> None:
    tokens, _ = vocabulary()
    changes = {"tokenizer.ggml.tokens": [*tokens[:-1], tokens[0]]}
    with pytest.raises(ModelDamaged, match="a token twice"):
        Tokenizer.from_folder(write_tokens(tmp_path / "tiny.gguf", metadata=changes))
