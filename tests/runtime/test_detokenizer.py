from collections.abc import Callable, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from d2f_runtime.text.detokenizer import Detokenizer

Decode = Callable[[Sequence[int]], str]

TEXT = "the cat · naïve € 漢字 🙂 ab abc\n"
PIECES = [
    b"the",
    b" cat",
    b" ",
    b"  ",
    b"ab",
    b"c",
    b"\n",
    "é".encode(),
    "漢字".encode(),
    b"",
    b"a.",
]
BYTE_VOCABULARY = PIECES + [bytes([byte]) for byte in sorted(set("é€🙂".encode()))] + [b"\xff"]
WORDS = ["▁the", "▁cat", "▁", "▁▁", "s", "ab", "c", "\n", "é", "漢", "", "<s>"]


def byte_decode(tokens: Sequence[int]) -> str:
    """Decode like a byte-level BPE: pieces of UTF-8, broken anywhere."""
    return b"".join(BYTE_VOCABULARY[token] for token in tokens).decode(errors="replace")


def word_decode(tokens: Sequence[int]) -> str:
    """Decode like sentencepiece: the text loses one leading space; bytes from 100 on."""
    text = ""
    run = b""
    for token in [*tokens, 0]:
        if token >= 100:
            run += bytes([token - 100])
            continue
        text += run.decode(errors="replace")
        run = b""
        text += "" if WORDS[token] == "<s>" else WORDS[token]
    return text.removesuffix(WORDS[0]).replace("▁", " ").removeprefix(" ")


def stripping_decode(tokens: Sequence[int]) -> str:
    """Decode like the former, without any space at the beginning."""
    return word_decode(tokens).lstrip(" ")


def strict_decode(tokens: Sequence[int]) -> str:
    """Decode like Hugging Face's byte fallback: one bad byte breaks its whole run."""
    text = ""
    run = b""
    for token in [*tokens, 0]:
        if token >= 100:
            run += bytes([token - 100])
            continue
        try:
            text += run.decode()
        except UnicodeDecodeError:
            text += "\ufffd" * len(run)
        run = b""
        text += WORDS[token]
    return text.removesuffix(WORDS[0]).replace("▁", " ").removeprefix(" ")


byte_tokens = st.lists(st.integers(0, len(BYTE_VOCABULARY) - 1), max_size=30)
word_tokens = st.lists(
    st.integers(0, len(WORDS) - 1) | st.sampled_from([100 + byte for byte in "é€".encode()]),
    max_size=30,
)
whole_characters = st.sampled_from([[100 + byte for byte in char.encode()] for char in "é€🙂"])
valid_tokens = st.lists(
    st.integers(0, len(WORDS) - 1).map(lambda token: [token]) | whole_characters, max_size=20
).map(lambda parts: [token for part in parts for token in part])
cuts = st.lists(st.integers(1, 5), min_size=30, max_size=100)
stops = st.lists(
    st.sampled_from(["ab", "abc", "bc", " cat", "c\n", "€", "the cat", "s "]), max_size=3
)


def cut_at(text: str, stop: Sequence[str]) -> str:
    found = [text.find(string) for string in stop if string in text]
    return text[: min(found, default=len(text))]


def check(decode: Decode, tokens: list[int], sizes: list[int], stop: list[str]) -> None:
    detokenizer = Detokenizer(decode=decode, stop=stop)
    longest = max(map(len, stop), default=1)
    released, at = "", 0
    for size in sizes:
        released += detokenizer.push(tokens[at : at + size])
        at += size
        assert cut_at(decode(tokens), stop).startswith(released)
        if not detokenizer.stopped:
            stable = decode(tokens[:at]).rstrip("\ufffd")
            assert len(released) > len(stable) - longest, "held back more than it must"
    released += detokenizer.push(tokens[at:])
    released += detokenizer.flush()
    assert released == cut_at(decode(tokens), stop)
    assert detokenizer.stopped == (released != decode(tokens))


@given(byte_tokens, cuts, stops)
@settings(max_examples=200)
def test_byte_level_texts_add_up_to_the_full_decode(
    tokens: list[int], sizes: list[int], stop: list[str]
) -> None:
    check(byte_decode, tokens, sizes, stop)


@pytest.mark.parametrize("decode", [word_decode, stripping_decode])
@given(tokens=word_tokens, sizes=cuts, stop=stops)
@example(tokens=[0, 2, 10, 11, 1, 2, 2, 0], sizes=[1] * 30, stop=[])
@settings(max_examples=120)
def test_sentencepiece_texts_add_up_to_the_full_decode(
    decode: Decode, tokens: list[int], sizes: list[int], stop: list[str]
) -> None:
    check(decode, tokens, sizes, stop)


@given(valid_tokens, cuts, stops)
@settings(max_examples=120)
def test_strict_byte_fallback_adds_up_where_bytes_are_valid(
    tokens: list[int], sizes: list[int], stop: list[str]
) -> None:
    detokenizer = Detokenizer(decode=strict_decode, stop=stop)
    released, at = "", 0
    for size in sizes:
        released += detokenizer.push(tokens[at : at + size])
        at += size
    released += detokenizer.push(tokens[at:]) + detokenizer.flush()
    assert released == cut_at(strict_decode(tokens), stop)


def utf8(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def test_incomplete_character_is_held_back_and_nothing_before_it() -> None:
    detokenizer = Detokenizer(decode=utf8)
    assert detokenizer.push("ab€".encode()[:4]) == "ab"
    assert detokenizer.push("€".encode()[2:]) == "€"
    assert detokenizer.flush() == ""


def test_character_that_never_completes_is_flushed() -> None:
    detokenizer = Detokenizer(decode=utf8)
    assert detokenizer.push(b"a\xe2\x82") == "a"
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_beginning_of_a_stop_string_is_held_back() -> None:
    detokenizer = Detokenizer(decode=utf8, stop=["\n\nQ"])
    assert detokenizer.push(b"yes\n") == "yes"
    assert detokenizer.push(b"\n") == ""
    assert detokenizer.push(b"no\n") == "\n\nno"
    assert detokenizer.flush() == "\n"
    assert not detokenizer.stopped


def test_nothing_comes_after_a_stop_string() -> None:
    detokenizer = Detokenizer(decode=utf8, stop=["\n\nQ"])
    assert detokenizer.push(b"yes\n\n") == "yes"
    assert detokenizer.push(b"Q: more") == ""
    assert detokenizer.stopped
    assert (detokenizer.push(b"more"), detokenizer.flush()) == ("", "")


def test_longer_stop_string_that_began_earlier_is_awaited() -> None:
    detokenizer = Detokenizer(decode=utf8, stop=["bcd", "c"])
    assert detokenizer.push(b"abc") == "a"
    assert not detokenizer.stopped
    assert (detokenizer.push(b"d"), detokenizer.stopped) == ("", True)


def test_stop_string_may_be_found_by_the_flush() -> None:
    detokenizer = Detokenizer(decode=utf8, stop=["bcd", "c"])
    assert detokenizer.push(b"abc") == "a"
    assert (detokenizer.flush(), detokenizer.stopped) == ("b", True)


def test_long_answers_are_not_decoded_again_and_again() -> None:
    lengths = []

    def decode(tokens: Sequence[int]) -> str:
        lengths.append(len(tokens))
        return utf8(tokens)

    detokenizer = Detokenizer(decode=decode)
    text = (TEXT * 40).encode()
    released = "".join(detokenizer.push(text[at : at + 32]) for at in range(0, len(text), 32))
    assert released + detokenizer.flush() == TEXT * 40
    assert max(lengths) <= 32 * 6
    assert sum(lengths) < 6 * len(text)
