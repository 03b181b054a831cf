from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lab.embedded_model.problems import Problem, problems
from lab.embedded_model.tokenizer_training import END_OF_TEXT, MASK, train_tokenizer

NUM_PROBLEMS = 1500


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(seed=0, num_problems=NUM_PROBLEMS)


@pytest.fixture(scope="module")
def held_out() -> list[Problem]:
    return list(islice(problems(1, split="held_out"), 400))


def test_the_vocabulary_has_1024_entries_and_begins_with_the_specials(
    tokenizer: Tokenizer,
) -> None:
    assert tokenizer.get_vocab_size() == 1024
    assert sorted(tokenizer.get_vocab().values()) == list(range(1024))
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    assert tokenizer.token_to_id(MASK) == 1


@given(text=st.text())
def test_any_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_problems_survive_the_round_trip(tokenizer: Tokenizer, held_out: list[Problem]) -> None:
    for problem in held_out:
        for text in (problem.question, problem.answer):
            assert tokenizer.decode(tokenizer.encode(text).ids) == text


@given(number=st.integers(min_value=0, max_value=10**9))
def test_every_digit_is_one_token(tokenizer: Tokenizer, number: int) -> None:
    assert tokenizer.encode(str(number)).tokens == list(str(number))


def test_a_digit_takes_the_space_before_it_along(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("is 42.").tokens == ["is", "Ġ4", "2", "."]
    assert tokenizer.encode(" 12 + 30 =").tokens == ["Ġ1", "2", "Ġ+", "Ġ3", "0", "Ġ="]


def test_each_word_of_the_problems_is_one_token(
    tokenizer: Tokenizer, held_out: list[Problem]
) -> None:
    words = [word for problem in held_out for word in problem.answer.split() if word.isalpha()]
    split_up = [word for word in words if len(tokenizer.encode(f" {word}").ids) > 1]
    # A few rare words may be missing from a short training text.
    assert len(split_up) < 0.01 * len(words)


def test_lengths_suit_the_model(tokenizer: Tokenizer, held_out: list[Problem]) -> None:
    questions, answers = (
        [len(tokenizer.encode(text).ids) for text in texts]
        for texts in zip(*((it.question, it.answer) for it in held_out), strict=True)
    )
    assert 50 <= sum(questions) / len(questions) <= 66
    assert max(questions) <= 110
    assert 84 <= sum(answers) / len(answers) <= 95
    assert max(answers) <= 160


def test_equal_seeds_give_equal_tokenizers(tokenizer: Tokenizer) -> None:
    again = train_tokenizer(seed=0, num_problems=NUM_PROBLEMS)
    assert again.to_str() == tokenizer.to_str()


def test_a_saved_tokenizer_encodes_the_same(tokenizer: Tokenizer, held_out: list[Problem]) -> None:
    loaded = Tokenizer.from_str(tokenizer.to_str())
    for problem in held_out[:50]:
        assert loaded.encode(problem.answer).ids == tokenizer.encode(problem.answer).ids


def test_a_vocabulary_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="raise vocab_size"):
        train_tokenizer(seed=0, num_problems=10, vocab_size=260)
