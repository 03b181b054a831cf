"""The whole path from problems to a student, with the tiny recipe on the CPU."""

import csv
import itertools
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

import lab.embedded_model.corpus as corpus_module
from d2f_export.distill.log import TrainingLog
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.evaluation.answers import decode_all
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_runtime.models.transformer import Transformer
from d2f_runtime.text.tokenizer import Tokenizer
from d2f_stream.core.errors import InvalidRequest
from d2f_stream.core.params import Attention, GenerationParams
from d2f_stream.core.presets import PRESETS
from lab.embedded_model.__main__ import main
from lab.embedded_model.corpus import EOS_ID, Corpus
from lab.embedded_model.evaluate import evaluate, held_out, report
from lab.embedded_model.recipe import RECIPES
from lab.embedded_model.stages import train_stage
from lab.embedded_model.tokenizer_training import train_tokenizer

pytestmark = pytest.mark.torch

RECIPE = RECIPES["tiny"]
QUICK = replace(RECIPE.twin, steps=2, tokens_per_batch=1024, warmup=1)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "SHARD_SIZE", 256)  # 4096 take some seconds to draw


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(seed=1, num_problems=500).save(str(path))
    return path


def fresh(seed: int = 0) -> Transformer:
    model = Transformer(RECIPE.config)
    model.init_weights(seed)
    return model


def corpus(tokenizer_path: Path, **changes: Any) -> Corpus:
    return Corpus(tokenizer_path, 3, tokens_per_batch=2048, **changes)


def steps(folder: Path) -> list[int]:
    with (folder / "log.csv").open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def test_batches_hold_prompt_answer_and_eos_padding(tokenizer_path: Path) -> None:
    codec = Tokenizer(tokenizer_path)
    batch = next(corpus(tokenizer_path).batches())
    for row, prompt_len in zip(batch.tokens.tolist(), batch.prompt_lens.tolist(), strict=True):
        end = row.index(EOS_ID)
        assert set(row[end:]) == {EOS_ID}
        assert len(row) - end >= 16
        assert codec.decode(row[prompt_len:end]).split("The answer is")[1].endswith(".")


def test_batches_are_a_function_of_seed_and_shard(tokenizer_path: Path) -> None:
    first, again, other = (corpus(tokenizer_path, position=shard) for shard in (5, 5, 6))
    tokens = [next(c.batches()).tokens for c in (first, again, other)]
    assert torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[2])
    assert (first.position, first.counts.used) == (6, len(tokens[0]))


def test_workers_draw_the_same_batches_as_one_process(tokenizer_path: Path) -> None:
    with (
        closing(corpus(tokenizer_path).batches()) as alone,
        closing(corpus(tokenizer_path, num_workers=1).batches()) as stream,
    ):
        for left, right in itertools.islice(zip(alone, stream, strict=False), 3):
            assert torch.equal(left.tokens, right.tokens)


def test_a_stopped_run_resumes_where_it_was_saved(
    tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    write = TrainingLog.losses

    def die_in_step_three(self: TrainingLog, step: int, *args: Any, **named: Any) -> None:
        if step == 3:
            raise Killed
        write(self, step, *args, **named)

    settings = replace(QUICK, tokenizer=str(tokenizer_path), steps=5, save_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingLog, "losses", die_in_step_three)
        with pytest.raises(Killed):
            train_stage(settings, tmp_path / "run", cpu=True)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    train_stage(settings, tmp_path / "run", cpu=True)
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5]
    assert load_checkpoint(tmp_path / "run").config == RECIPE.twin_config


def test_a_finished_stage_is_not_begun_anew(tokenizer_path: Path, tmp_path: Path) -> None:
    settings = replace(QUICK, tokenizer=str(tokenizer_path))
    train_stage(settings, tmp_path / "run", cpu=True)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").iterdir()}
    train_stage(settings, tmp_path / "run", cpu=True)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").iterdir()} == before
    train_stage(replace(settings, steps=4), tmp_path / "run", cpu=True)
    assert steps(tmp_path / "run") == [1, 2, 3, 4]
    with pytest.raises(InvalidRequest, match=r"holds a training with lr 0\.001, not 0\.5"):
        train_stage(replace(settings, lr=0.5), tmp_path / "run", cpu=True)


def test_time_ends_a_training_and_its_decay(tokenizer_path: Path, tmp_path: Path) -> None:
    settings = replace(
        QUICK, tokenizer=str(tokenizer_path), steps=1_000_000, max_seconds=1.0, decay=1.0
    )
    train_stage(settings, tmp_path / "run", cpu=True)
    with (tmp_path / "run" / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    rates = [float(row["lr"]) for row in rows]
    assert rates == sorted(rates, reverse=True)
    for row, following in itertools.pairwise(rows):  # a step's rate is of the time before it
        left = 1.0 - float(row["seconds"])
        assert float(following["lr"]) == pytest.approx(1e-3 * left, abs=1.1e-4)  # 0.1 s are shown


def test_a_student_without_a_teacher_is_refused(tokenizer_path: Path, tmp_path: Path) -> None:
    settings = replace(RECIPE.student, tokenizer=str(tokenizer_path))
    with pytest.raises(InvalidRequest, match="the student needs a teacher; give --start"):
        train_stage(settings, tmp_path / "run", cpu=True)
    assert not (tmp_path / "run").exists()


def test_vanilla_decoding_of_an_untrained_model_ends(tokenizer_path: Path) -> None:
    codec = Tokenizer(tokenizer_path)
    sample = held_out(3)
    prompts = [codec.encode(problem.question) for problem in sample]
    params = PRESETS["llada-vanilla"].with_overrides({"max_new_tokens": 20, "block_size": 8})
    answers = decode_all(TorchBackend(fresh(), name="tiny"), prompts, params)
    assert [answer.num_steps for answer in answers] == [20, 20, 20]
    assert report("untrained", {}, sample, answers, codec).accuracy == 0.0


@pytest.mark.parametrize("attention", ["blocks", "full"])
def test_batched_evaluation_equals_one_problem_at_a_time(
    tokenizer_path: Path, attention: Attention
) -> None:
    codec = Tokenizer(tokenizer_path)
    sample = held_out(5)
    backend = TorchBackend(fresh(), name="tiny")
    params = GenerationParams(
        block_size=8, max_new_tokens=20, confidence_threshold=0.01, attention=attention
    )
    together = evaluate("x", backend, codec, sample, params, rows=4)
    alone = evaluate("x", backend, codec, sample, params, rows=1)
    assert together == alone


def test_command_line_makes_twin_teacher_and_student(tokenizer_path: Path, tmp_path: Path) -> None:
    common = ["--recipe", "tiny", "--tokenizer", str(tokenizer_path), "--steps", "2", "--cpu"]
    for stage, start in (("twin", None), ("teacher", "twin"), ("student", "teacher")):
        begin = ["--start", str(tmp_path / start)] if start else []
        main([stage, *common, "--output", str(tmp_path / stage), *begin])
    setting = '{"block_size": 16, "max_new_tokens": 32}'
    output = tmp_path / "figures.jsonl"
    arguments = ["evaluate", str(tmp_path / "student"), "--tokenizer", str(tokenizer_path)]
    main([*arguments, "--problems", "2", "--setting", setting, "--output", str(output)])
    assert '"num_problems": 2' in output.read_text()
