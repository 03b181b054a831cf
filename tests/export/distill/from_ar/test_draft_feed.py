"""Packed batches: what they hold, and that their number is all that decides it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2f_export.distill.from_ar.answers import Answers
from d2f_export.distill.from_ar.feed import Feed, Stage
from d2f_export.distill.from_ar.noise import Noise
from d2f_export.distill.from_ar.schedule import curriculum
from d2f_stream.core.errors import InvalidRequest

pytestmark = pytest.mark.torch

MASK = 1


def feed(**changes: object) -> Feed:
    examples = [
        (list(range(10, 10 + n % 7 + 1)), list(range(20, 20 + 3 + 5 * n % 60))) for n in range(40)
    ]
    values: dict[str, object] = {
        "rows": 2, "clean_length": 128, "noisy_length": 256, "mask_id": MASK, "seed": 3,
        "stages": [(0, Stage((2, 4), (0.5, 0.5)))], "noise": Noise(4, 0.4),
    }  # fmt: skip
    return Feed(Answers.of(examples), **(values | changes))  # type: ignore[arg-type]


@given(length=st.integers(1, 200), block=st.integers(2, 16), seed=st.integers(0, 10**6))
def test_noise_covers_the_answer_by_windows_of_blocks(length: int, block: int, seed: int) -> None:
    for noise_of in (Noise(), Noise(4, 0.4)):
        noise = noise_of.draw(np.random.default_rng(seed), length, block)
        for window in range(int(noise.window[-1]) + 1):
            place = np.flatnonzero(noise.window == window)
            assert (np.diff(place) == 1).all()
            assert (noise.window_start[place] == place[0]).all()
            assert (noise.block[place] == (place - place[0]) // block).all()
            assert noise.block[place].max() < noise_of.window_blocks
        assert noise.masked.all() or noise_of.all_masked < 1


def test_rows_that_learn_are_of_the_window_of_the_mask_that_they_predict() -> None:
    batch = feed()[4]
    noisy, window = batch["noisy"].flatten(), batch["window"].flatten()
    clean, position = batch["clean"].flatten(), batch["clean_position"].flatten()
    row = batch["student_row"]
    assert len(row) > 50
    assert (noisy[row + 1] == MASK).all()
    assert (window[row] == window[row + 1]).all()
    assert (position[batch["teacher_row"]] == batch["noisy_position"].flatten()[row]).all()
    kept = noisy[row] != MASK
    assert (clean[batch["teacher_row"]][kept] == noisy[row][kept]).all()
    first = torch.cat([torch.tensor([True]), window[1:] != window[:-1]])
    missed = (noisy == MASK) & ~first
    assert int(missed.sum()) == len(row)  # every other mask is learnt


def test_each_mask_of_a_single_block_learns_the_token_behind_it() -> None:
    batch = feed(noise=Noise())[4]
    noisy, position = batch["noisy"].flatten(), batch["noisy_position"].flatten()
    window = batch["window"].flatten()
    assert (noisy[window >= 0] == MASK).all()
    row = batch["student_row"]
    same = window[row] == window[row + 1]
    assert 0.2 < float(same.float().mean()) < 0.9  # the others are the last of their window
    assert (position[row + 1] == position[row] + 1).all()
    assert (batch["clean_position"].flatten()[batch["teacher_row"]] == position[row]).all()
    ends = torch.cat([position[1:] != position[:-1] + 1, torch.tensor([True])])
    assert len(row) == int((~ends).sum())  # all but the last of each copy


def test_a_batch_is_a_function_of_its_number() -> None:
    one, other = feed(), feed()
    expected = one[7]
    for number in (0, 60, 7):  # whatever was asked before, over epochs too
        found = other[number]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_processes_take_different_rows() -> None:
    rows = [feed(rank=rank, num_ranks=2)[0]["clean"] for rank in range(2)]
    assert not torch.equal(*rows)


def test_padding_of_what_learns_weighs_nothing() -> None:
    batch = feed(pad_to=500)[0]
    assert len(batch["student_row"]) % 500 == 0
    assert (batch["weight"][-10:] == 0).all()


def test_curriculum_adds_sizes_and_leaves_none_out() -> None:
    stages = curriculum((4, 8, 16), 300)
    assert [first for first, _ in stages] == [0, 150, 300]
    assert [stage.sizes for _, stage in stages] == [(4,), (4, 8), (4, 8, 16)]
    assert all(sum(stage.shares) == pytest.approx(1.0) for _, stage in stages)


def test_answers_come_back_from_their_file(tmp_path: Path) -> None:
    answers = Answers.of([([1, 2], [3]), ([4], [5, 70_000])])
    answers.write(tmp_path / "a.npz")
    found = Answers.read(tmp_path / "a.npz")
    assert found.tokens.tolist() == [1, 2, 3, 4, 5, 70_000]
    assert found.prompts.tolist() == [2, 1]
    assert found.num_answer_tokens == 3
    assert found.select(np.array([1])).tokens.tolist() == [4, 5, 70_000]


def test_file_without_answers_is_refused(tmp_path: Path) -> None:
    Answers.of([([1, 2], [])]).write(tmp_path / "a.npz")
    with pytest.raises(InvalidRequest, match="without an answer"):
        Answers.read(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_text("text")
    with pytest.raises(InvalidRequest, match=r"b\.npz is no file of answers"):
        Answers.read(tmp_path / "b.npz")
