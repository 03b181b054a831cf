import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2f_export.distill.examples import ExampleFiles
from d2f_stream.core.errors import InvalidRequest


def files(*paths: Path) -> ExampleFiles:
    return ExampleFiles(paths, prompt_field="prompt", answer_field="answer")


def write(path: Path, *lines: object) -> Path:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n")
    return path


def test_prompts_and_chats_are_read(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "p", "answer": "a", "more": [1]},
        "",
        {"messages": [*chat, {"role": "assistant", "content": "x", "name": "n"}]},
    )
    first, second = files(path)
    assert (first.prompt, first.answer, first.messages[0].role) == ("p", "a", "user")
    assert [m.content for m in second.messages] == ["s", "u"]
    assert (second.prompt, second.answer) == (None, "x")
    assert files(path).check() == 2


def test_fields_can_have_other_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "q", "solution": "s"})
    (example,) = ExampleFiles([path], prompt_field="question", answer_field="solution")
    assert (example.prompt, example.answer) == ("q", "s")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p", "answer": ', "is not valid JSON"),
        ("[1]", "is no example"),
        ({"prompt": "p"}, "has no 'answer'"),
        ({"text": "p"}, "has no 'prompt'"),
        ({"prompt": 3, "answer": "a"}, "is no example: Expected `str`, got `int`"),
        ({"prompt": "p", "answer": " "}, "has an empty 'answer'"),
        ({"messages": [{"role": "user", "content": "u"}]}, "has messages that do not end"),
        ({"messages": [{"role": "user"}]}, "is no example: .*`content`"),
    ],
)
def test_bad_line_is_named_by_file_and_number(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "answer": "a"}, "", line)
    with pytest.raises(InvalidRequest, match=rf"a\.jsonl:3 {message}"):
        files(path).check()


def test_bytes_that_are_no_text_are_named_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "p\xff", "answer": "a"}\n')
    with pytest.raises(InvalidRequest, match=r"a\.jsonl:1 is not valid JSON"):
        files(tmp_path / "a.jsonl").check()


def test_missing_and_empty_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="nowhere cannot be read: No such file"):
        files(tmp_path / "nowhere").check()
    with pytest.raises(InvalidRequest, match="there is no example in"):
        files(write(tmp_path / "a.jsonl", "")).check()


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    buffer=st.integers(1, 40),
    seed=st.integers(0, 5),
    skip=st.integers(0, 40),
)
def test_an_epoch_is_a_seeded_order_of_all_examples_that_can_be_entered_anywhere(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], buffer: int, seed: int, skip: int
) -> None:
    folder = tmp_path_factory.mktemp("data")
    paths = [
        write(folder / f"{n}.jsonl", *({"prompt": f"{n} {i}", "answer": "a"} for i in range(size)))
        for n, size in enumerate(sizes)
    ]
    epoch = [e.prompt for e in files(*paths).shuffled(seed, 1, buffer)]
    assert Counter(epoch) == Counter(
        f"{n} {i}" for n, size in enumerate(sizes) for i in range(size)
    )
    entered = [e.prompt for e in files(*paths).shuffled(seed, 1, buffer, skip=skip)]
    assert entered == epoch[skip:]


def test_epochs_and_seeds_differ(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *({"prompt": str(i), "answer": "a"} for i in range(50)))
    orders = {
        tuple(e.prompt for e in files(path).shuffled(seed, epoch, 100))
        for seed in range(2)
        for epoch in range(2)
    }
    assert len(orders) == 4
