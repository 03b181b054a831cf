import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from d2f_export.distill.examples import Example, ExampleFiles, Message
from d2f_export.distill.feed import Batch, Feed
from d2f_export.distill.sequences import Counts, Packing
from d2f_stream.core.errors import InvalidRequest

pytestmark = pytest.mark.torch

END, EOS = 9, 8


class Letters:
    """One id for each letter; a template that puts a 1 before and a 2 behind."""

    special_tokens: Mapping[str, int] = MappingProxyType({})

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def render(self, messages: Sequence[object]) -> str:
        contents = [message["content"] for message in messages]  # type: ignore[index]
        return "\x01" + "|".join(contents) + "\x02"


def packing(length: int = 12, *, overlong: str = "drop", **options: object) -> Packing:
    values: dict[str, object] = {
        "codec": Letters(), "end_id": END, "padding_id": EOS, "length": length,
        "overlong": overlong, "min_answer": 3, "chat_template": True, "counts": Counts(),
    }  # fmt: skip
    return Packing(**(values | options))  # type: ignore[arg-type]


def example(prompt: str, answer: str) -> Example:
    return Example((Message("user", prompt),), prompt, answer)


def test_a_sequence_is_prompt_answer_end_and_padding() -> None:
    packed = packing().pack(example("ab", "cd"))
    assert packed is not None
    assert list(packed.tokens) == [1, 97, 98, 2, 99, 100, END, *[EOS] * 5]
    assert packed.prompt_len == 4


def test_prompts_can_go_without_template() -> None:
    packed = packing(chat_template=False).pack(example("ab", "cd"))
    assert packed is not None
    assert packed.tokens[:4] == (97, 98, 99, 100)
    with pytest.raises(InvalidRequest, match="need the chat template"):
        packing(chat_template=False).pack(Example((Message("user", "u"),), None, "a"))


def test_overlong_examples_are_dropped_or_cut_and_counted() -> None:
    dropping, cutting = packing(), packing(overlong="cut")
    assert dropping.pack(example("ab", "c" * 8)) is None
    assert dropping.counts == Counts(used=0, cut=0, dropped=1)
    packed = cutting.pack(example("ab", "c" * 8))
    assert packed is not None
    assert packed.tokens[-1] == ord("c")
    assert len(packed.tokens) == 12
    assert cutting.pack(example("abcdefgh", "c" * 8)) is None  # two places are left, three needed
    assert cutting.counts == Counts(used=1, cut=1, dropped=1)


@pytest.fixture
def files(tmp_path: Path) -> ExampleFiles:
    lines = [json.dumps({"prompt": chr(97 + i), "answer": "x" * (1 + i % 12)}) for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    return ExampleFiles([tmp_path / "a.jsonl"], prompt_field="prompt", answer_field="answer")


def feed(files: ExampleFiles, *, rank: int = 0, num_ranks: int = 1, length: int = 12) -> Feed:
    return Feed(
        files, 20, packing(length), seed=1, buffer=7, rows=2, rank=rank, num_ranks=num_ranks
    )  # fmt: skip


def take(stream: Feed, number: int) -> list[Batch]:
    return list(itertools.islice(stream.batches(), number))


def test_a_feed_goes_on_where_it_stood(files: ExampleFiles) -> None:
    whole = take(feed(files), 25)  # several passes
    first = feed(files)
    take(first, 9)
    second = feed(files)
    second.position = first.position
    rest = take(second, 16)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(whole[9:], rest, strict=True))


def test_processes_share_the_stream_of_one(files: ExampleFiles) -> None:
    alone = take(feed(files), 6)
    halves = [take(feed(files, rank=rank, num_ranks=2), 3) for rank in range(2)]
    shared = [half[i] for i in range(3) for half in halves]
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(alone, shared, strict=True))


def test_data_of_which_nothing_fits_is_an_error(files: ExampleFiles) -> None:
    with pytest.raises(InvalidRequest, match="none of the 20 examples fits into length 4; raise"):
        take(feed(files, length=4), 1)
