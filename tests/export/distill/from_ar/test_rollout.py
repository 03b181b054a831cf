"""Answers that are decoded again with a draft: whose they are, and where their windows stand."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2f_export.distill.from_ar.answers import Answers
from d2f_export.distill.from_ar.feed import Feed, Stage
from d2f_export.distill.from_ar.noise import Noise
from d2f_export.distill.from_ar.run import train_draft
from d2f_export.distill.from_ar.settings import DraftSettings, WritingSettings
from d2f_export.distill.from_ar.writing import write_data
from d2f_runtime.backends.torch_backend import load
from d2f_runtime.evaluation.answers import decode_all
from d2f_stream.core.errors import InvalidParams, InvalidRequest
from d2f_stream.core.presets import PRESETS
from tiny_checkpoints import write_model

pytestmark = pytest.mark.torch

MASK = 1
RANDOM = np.random.default_rng(0)
PROMPTS = [RANDOM.integers(3, 60, size).tolist() for size in (3, 1, 4, 2, 5, 1, 4, 3)]
SAID = 212  # what the tiny model often says in the end


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_model(folder, "qwen2")
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | {"eos_token_id": [290, SAID]}))
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "texts.npz"
    Answers.of([(prompt, [20, 21, 2]) for prompt in PROMPTS]).write(path)
    return path


def training(base: Path, data: Path, **changes: object) -> DraftSettings:
    values: dict[str, object] = {
        "from_ar": str(base), "data": (str(data),), "rank": 4, "rows": 2, "clean_length": 128,
        "noisy_length": 128, "steps": 2, "block_sizes": (2, 4), "log_every": 1,
    }  # fmt: skip
    return DraftSettings(**(values | changes))  # type: ignore[arg-type]


def test_windows_begin_where_decoding_stopped(base: Path, written: Path, tmp_path: Path) -> None:
    draft = train_draft(training(base, written), tmp_path / "draft", cpu=True)
    backend = load(base, device="cpu", adapter=draft)
    params = PRESETS["verified"].with_overrides({"block_size": 3, "max_new_tokens": 48})
    alone = decode_all(backend, PROMPTS, params.with_overrides({"block_size": 1}))
    whole = [
        (prompt, list(answer.tokens))
        for prompt, answer in zip(PROMPTS, alone, strict=True)
        if answer.tokens[-1] in backend.info.eos_ids
    ]
    assert 1 < len(whole) < len(PROMPTS)  # the others are unfinished
    settings = WritingSettings(
        model=str(base), draft=str(draft), written=(str(written),), block_size=3,
        answer_length=48, slots=2, length=64,
    )  # fmt: skip
    rolled = write_data(settings, tmp_path / "rolled.npz", cpu=True)
    assert rolled.tokens.tolist() == Answers.of(whole).tokens.tolist()
    assert (Answers.read(tmp_path / "rolled.npz").begins == rolled.begins).all()
    steps = decode_all(backend, [prompt for prompt, _ in whole], params, rows=1)
    for number, start in enumerate(rolled.starts + rolled.prompts):
        begins = rolled.begins[start : rolled.starts[number] + rolled.lengths[number]]
        places = begins.nonzero()[0]
        # each step but the last begins one window, of at most its three masks and the token before
        assert len(places) == steps[number].num_steps - 1
        assert not len(places) or (places[0] == 0 and np.diff(places).max(initial=1) <= 4)
    assert not rolled.begins[rolled.starts].any()
    train_draft(training(base, tmp_path / "rolled.npz"), tmp_path / "on", cpu=True)


@given(data=st.data(), length=st.integers(1, 80), block=st.integers(2, 16))
def test_windows_stand_where_decoding_began_them(
    data: st.DataObject, length: int, block: int
) -> None:
    places = data.draw(st.sets(st.integers(0, length - 1), min_size=1))
    begins = np.array(sorted(places))
    noise = Noise.behind(begins, length, block)
    for window, begin in enumerate(begins):
        of = noise.window == window
        stop = min(begin + block, length)
        assert noise.place[of].tolist() == list(range(begin, stop))
        assert (noise.window_start[of] == begin).all()
        assert noise.learns[of].tolist() == [place + 1 < length for place in range(begin, stop)]
    assert noise.masked.all()


def test_rolled_answers_are_fed_by_their_windows() -> None:
    plain = Answers.of([([5, 6], list(range(20, 40))), ([7], list(range(50, 65)))])
    begins = np.zeros(len(plain.tokens), np.bool_)
    begins[[2, 5, 6, 14]] = True  # of the first; nobody has decoded the second
    answers = Answers(plain.tokens, plain.lengths, plain.prompts, begins)
    batch = Feed(
        answers, rows=1, clean_length=64, noisy_length=256, mask_id=MASK, seed=0,
        stages=[(0, Stage((4,), (1.0,)))], noise=Noise(),
    )[0]  # fmt: skip
    doc, start, window = (batch[name][0] for name in ("doc_start", "window_start", "window"))
    clean = batch["clean"][0]
    first = int((clean == 5).nonzero()[0])
    rolled = doc == first
    assert {int(place) - first for place in start[rolled & (window >= 0)]} == {2, 5, 6, 14}
    row, goal = batch["student_row"], batch["teacher_row"]
    assert (batch["clean_position"].flatten()[goal] == batch["noisy_position"].flatten()[row]).all()
    learnt = {int(clean[place + 1]) for place in goal[rolled[row]]}
    assert learnt == {21, 22, 23, 24, 25, 26, 27, 28, 33, 34, 35, 36}


def test_draft_and_what_it_answers_belong_together(tmp_path: Path) -> None:
    with pytest.raises(InvalidParams, match="written is"):
        WritingSettings(model="m", draft="d")
    with pytest.raises(InvalidParams, match="written is"):
        WritingSettings(model="m", written=("texts.npz",))
    write_model(tmp_path / "base", "qwen2")
    settings = WritingSettings(
        model=str(tmp_path / "base"), draft="d", written=(str(tmp_path / "none.npz"),), length=64
    )
    with pytest.raises(InvalidRequest, match=r"none\.npz is no file of answers"):
        write_data(settings, tmp_path / "rolled.npz", cpu=True)
