"""The whole path from problems to a student, with the tiny recipe on the CPU."""

import csv
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from d2f_export.__main__ import main
from d2f_export.embedded_model.corpus import EOS_ID, Corpus
from d2f_export.embedded_model.evaluate import decode_all, evaluate, held_out, report
from d2f_export.embedded_model.recipe import RECIPES
from d2f_export.embedded_model.tokenizer_training import train_tokenizer
from d2f_export.stages import (
    Distillation,
    NoiseSettings,
    Objective,
    StudentObjective,
    TeacherObjective,
    TwinObjective,
)
from d2f_export.training import TrainSettings, train
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_runtime.models.transformer import Transformer
from d2f_runtime.text.tokenizer import Tokenizer
from d2f_stream.core.params import Attention, GenerationParams
from d2f_stream.core.presets import PRESETS

pytestmark = pytest.mark.torch

RECIPE = RECIPES["tiny"]
BY_DATA = replace(RECIPE.distillation, forward_kl=0.0, data=1.0)
QUICK = TrainSettings(steps=2, tokens_per_batch=1024, warmup=1, log_every=1)


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(seed=1, num_problems=500).save(str(path))
    return path


def fresh(seed: int = 0, *, twin: bool = False) -> Transformer:
    model = Transformer(RECIPE.twin_config if twin else RECIPE.config)
    model.init_weights(seed)
    return model


def test_batches_hold_prompt_answer_and_eos_padding(tokenizer_path: Path) -> None:
    codec = Tokenizer(tokenizer_path)
    batch = next(Corpus(tokenizer_path, seed=3).batches(2048))
    for row, prompt_len in zip(batch.tokens.tolist(), batch.prompt_lens.tolist(), strict=True):
        end = row.index(EOS_ID)
        assert set(row[end:]) == {EOS_ID}
        assert len(row) - end >= 16
        assert codec.decode(row[prompt_len:end]).split("The answer is")[1].endswith(".")


def test_batches_are_a_function_of_seed_and_shard(tokenizer_path: Path) -> None:
    corpus = Corpus(tokenizer_path, seed=3)
    first = next(corpus.batches(2048, first_shard=5))
    again = next(corpus.batches(2048, first_shard=5))
    other = next(corpus.batches(2048, first_shard=6))
    assert (first.tokens == again.tokens).all()
    assert first.tokens.shape != other.tokens.shape or (first.tokens != other.tokens).any()


def test_workers_draw_the_same_batches_as_one_process(tokenizer_path: Path) -> None:
    alone = Corpus(tokenizer_path, seed=3).batches(2048)
    stream = Corpus(tokenizer_path, seed=3, num_workers=1).batches(2048)
    for left, right in itertools.islice(zip(alone, stream, strict=False), 3):
        assert (left.tokens == right.tokens).all()
    stream.close()  # type: ignore[attr-defined]


def test_a_run_that_starts_anew_starts_its_log_anew(tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,seconds,tokens,loss,lr\n7,1,1,1,1\n")
    train(fresh(twin=True), TwinObjective(), Corpus(tokenizer_path, seed=3), tmp_path, QUICK)
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [1, 2]


def test_a_stopped_run_resumes_where_it_was_saved(tokenizer_path: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    class DyingObjective(TwinObjective):
        calls = 0

        def __call__(self, *args):  # type: ignore[no-untyped-def]
            self.calls += 1
            if self.calls == 3:
                raise Killed
            return super().__call__(*args)

    corpus = Corpus(tokenizer_path, seed=3)
    settings = replace(QUICK, steps=5, save_every_s=0.0)
    with pytest.raises(Killed):
        train(fresh(twin=True), DyingObjective(), corpus, tmp_path, settings)
    assert (tmp_path / "state.pt").exists()
    assert not (tmp_path / "model.safetensors").exists()
    train(fresh(seed=99, twin=True), TwinObjective(), corpus, tmp_path, settings)
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5]
    assert load_checkpoint(tmp_path).config == RECIPE.twin_config
    assert not (tmp_path / "state.pt").exists()


@pytest.mark.parametrize("stage", ["twin", "teacher", "student"])
def test_each_objective_learns_a_batch_by_heart(stage: str, tokenizer_path: Path) -> None:
    torch.manual_seed(0)
    model = fresh(twin=stage == "twin")
    objectives: dict[str, Objective] = {
        "twin": TwinObjective(),
        "teacher": TeacherObjective(RECIPE.distillation.noise),
        "student": StudentObjective(fresh(seed=7).eval(), BY_DATA),
    }
    objective = objectives[stage]
    batch = next(Corpus(tokenizer_path, seed=3).batches(1024))
    tokens, lens = torch.from_numpy(batch.tokens), torch.from_numpy(batch.prompt_lens)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = objective(model, tokens, lens, generator)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_a_student_equal_to_its_teacher_pays_only_for_what_it_cannot_see(
    tokenizer_path: Path,
) -> None:
    """With one block over everything the masks are the same, and the distillation loss is zero."""
    torch.manual_seed(0)
    unshifted = replace(RECIPE.config, shift_logits=False)
    model, teacher = Transformer(unshifted), Transformer(unshifted)
    teacher.load_state_dict(model.state_dict())
    objective = StudentObjective(teacher, Distillation(NoiseSettings(block_sizes=(512,))))
    batch = next(Corpus(tokenizer_path, seed=3).batches(2048))
    tokens = torch.from_numpy(batch.tokens)
    lens = torch.zeros(len(tokens), dtype=torch.int64)  # no prompt, so full attention for all
    loss = objective(model, tokens, lens, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(0.0, abs=1e-5)


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
    common = ["--recipe", "tiny", "--tokenizer", str(tokenizer_path), "--steps", "2"]
    for stage, start in (("twin", None), ("teacher", "twin"), ("student", "teacher")):
        begin = ["--start", str(tmp_path / start)] if start else []
        main([stage, *common, "--output", str(tmp_path / stage), *begin])
    setting = '{"block_size": 16, "max_new_tokens": 32}'
    output = tmp_path / "figures.jsonl"
    arguments = ["evaluate", str(tmp_path / "student"), "--tokenizer", str(tokenizer_path)]
    main([*arguments, "--problems", "2", "--setting", setting, "--output", str(output)])
    assert '"num_problems": 2' in output.read_text()
