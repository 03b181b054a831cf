"""Open text: the measures against oracles, and the whole experiment in its tiny form."""

import asyncio
import email
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2f_export.corpus import EOS_ID
from d2f_export.evaluate import decode_all
from d2f_export.open_text.__main__ import main
from d2f_export.open_text.continuations import continue_all
from d2f_export.open_text.measures import likelihood, repetition
from d2f_export.open_text.pieces import NUM_TOKENS, Pieces
from d2f_export.open_text.recipe import OPEN_TEXT, HiddenInputs
from d2f_export.open_text.scores import read_records, texts_of
from d2f_export.open_text.systems import REFERENCES, systems
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.models.transformer import Transformer
from d2f_stream.params import GenerationParams

pytestmark = pytest.mark.torch

RECIPE = OPEN_TEXT["tiny"]
PROMPTS = [[5, 6, 7], [8] * 9, [300, 20]]


def fresh(*, twin: bool) -> Transformer:
    training = RECIPE.training
    model = Transformer(training.twin_config if twin else training.config)
    model.init_weights(0)
    return model.eval()


@torch.no_grad()
def nats_alone(model: Transformer, row: list[int], start: int) -> list[float]:
    """-log p of row[start:] in fp64, one text and one token at a time, no padding, no batch."""
    nats = []
    for end in range(start, len(row)):
        tokens = torch.tensor([row[:end]])
        hidden, _ = model(tokens, torch.arange(end)[None], None, causal=True)
        log_p = model.logits(hidden[0, -1]).double().log_softmax(dim=-1)
        nats.append(-float(log_p[row[end]]))
    return nats


def test_likelihood_is_the_twins_of_each_text_alone() -> None:
    twin = fresh(twin=True)
    texts = [[9, 10, 0, 11], [12], [500, 13, 14, 15, 16, 17]]
    parts = [nats_alone(twin, [*p, *t], len(p)) for p, t in zip(PROMPTS, texts, strict=True)]
    sums, counts = [sum(part) for part in parts], [len(part) for part in parts]
    mean = sum(sums) / sum(counts)
    residuals = [s - mean * n for s, n in zip(sums, counts, strict=True)]
    found = likelihood(twin, PROMPTS, texts)
    assert found.bits == pytest.approx(mean / math.log(2), rel=1e-5)  # fp32 against fp64
    assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-4)
    error = math.hypot(*residuals) / sum(counts) / math.log(2)
    assert found.error == pytest.approx(error, rel=1e-3)


def test_a_twin_that_sees_all_its_inputs_learns_by_plain_cross_entropy() -> None:
    twin = fresh(twin=True)
    tokens = torch.randint(2, 512, (2, 12), generator=torch.Generator().manual_seed(0))
    prompt_lens = torch.tensor([4, 4])
    generator = torch.Generator().manual_seed(0)
    loss = HiddenInputs(share=0.0)(twin, tokens, prompt_lens, generator)
    nats = [nat for row in tokens.tolist() for nat in nats_alone(twin, row, 1)]
    assert loss.item() == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    hidden = HiddenInputs(share=0.5)(twin, tokens, prompt_lens, generator)
    assert hidden.item() != pytest.approx(loss.item(), rel=1e-5)


def test_repetition_of_texts_made_by_hand() -> None:
    found = repetition([[1, 2, 3, 4, 1, 2, 3, 4], [5, 5, 5, 5, 5]])
    assert found.repeated_4grams == pytest.approx((1 / 5 + 1 / 2) / 2)
    assert found.distinct_2 == pytest.approx((4 / 7 + 1 / 4) / 2)
    assert found.longest == pytest.approx((4 + 4) / 2)
    assert found.doubled == pytest.approx((0 + 1) / 2)


@given(st.lists(st.integers(0, 3), min_size=4, max_size=24))
def test_the_longest_passage_that_occurs_twice_is_found(text: list[int]) -> None:
    def occurs_twice(size: int) -> bool:
        grams = [tuple(text[i : i + size]) for i in range(len(text) - size + 1)]
        return len(set(grams)) < len(grams)

    longest = max((size for size in range(1, len(text)) if occurs_twice(size)), default=0)
    assert repetition([text]).longest == longest


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_continuations_do_not_depend_on_what_runs_beside(temperature: float) -> None:
    backend = TorchBackend(fresh(twin=False), name="tiny")
    params = GenerationParams(
        block_size=8, max_new_tokens=20, confidence_threshold=0.01, temperature=temperature
    )
    alone = continue_all(backend, PROMPTS, params, rows=1)
    assert alone == continue_all(backend, PROMPTS, params, rows=3)
    assert {len(answer.tokens) for answer in alone} == {20}  # no EOS ends one
    assert (alone == decode_all(backend, PROMPTS, params)) == (temperature == 0)


def test_texts_have_prompts_of_one_document() -> None:
    tokens = np.full((4, NUM_TOKENS), 7, dtype=np.int16)
    tokens[1, 20] = tokens[2, 50] = EOS_ID
    texts = texts_of(Pieces(tokens, np.full(4, 40)), 9, 24)
    assert len(texts.prompts) == 3
    assert {len(prompt) for prompt in texts.prompts} == {40}
    assert texts.continuations[1][10] == EOS_ID
    with pytest.raises(ValueError, match="none of 1 held-out pieces has a prompt"):
        texts_of(Pieces(tokens[1:2], np.array([40])), 9, 24)


def test_no_two_systems_are_the_same() -> None:
    chosen = [*REFERENCES, *systems(32, (0.5, 0.7, 0.9))]
    keys = [json.dumps([system.name, system.setting]) for system in chosen]
    assert len(set(keys)) == len(keys)


ROOTS = [str(Path(module.__file__).parent) for module in (asyncio, email) if module.__file__]
RUN = ["--recipe", "tiny", "--device", "cpu", "--readers", "0", "--seconds", "60"]
COMMAND = [*RUN, *(part for root in ROOTS for part in ("--root", root))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open-text") / "run"
    main([*COMMAND, "--output", str(folder)])
    return folder


def test_a_run_leaves_a_record_of_every_system(run: Path) -> None:
    records = read_records(run / "records.jsonl")
    wanted = [*REFERENCES, *systems(RECIPE.num_new, RECIPE.thresholds)]
    assert [(r["system"], r["setting"]) for r in records] == [(s.name, s.setting) for s in wanted]
    for record in records:
        assert record["perplexity"] == pytest.approx(2 ** record["bits_per_token"], rel=1e-3)
        assert record["num_new"] == RECIPE.num_new
    assert {r["tokens_per_step"] for r in records if r["system"] in ("ar", "vanilla")} == {1.0}
    d2f = [
        r["tokens_per_step"]
        for r in records
        if r["system"] == "d2f" and not r["setting"]["temperature"]
    ]
    assert min(d2f) > 1.0  # a threshold below what an untrained model is sure of
    assert (run / "open-text.png").stat().st_size > 0
    samples = (run / "samples.txt").read_text(encoding="utf-8")
    assert samples.count("[D2F, confidence above 0.9, 24 tokens") == 3
    for stage in ("twin", "teacher", "student"):
        assert (run / stage / "log.csv").exists()


def test_a_run_that_was_stopped_goes_on(run: Path) -> None:
    path = run / "records.jsonl"
    before = path.read_text(encoding="utf-8")
    lines = before.splitlines(keepends=True)
    weights = (run / "student" / "model.safetensors").stat().st_mtime_ns
    path.write_text("".join(lines[:-2]) + lines[-2][:30], encoding="utf-8")  # killed in mid-write
    main([*COMMAND, "--output", str(run)])

    def figures(text: str) -> list[dict[str, object]]:
        return [{**json.loads(line), "seconds": 0} for line in text.splitlines()]

    assert figures(path.read_text(encoding="utf-8")) == figures(before)
    assert (run / "student" / "model.safetensors").stat().st_mtime_ns == weights


def test_when_time_is_up_what_is_there_stays(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "records.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:4]), encoding="utf-8")
    main([*COMMAND, "--seconds", "0", "--output", str(run)])
    assert path.read_text(encoding="utf-8") == "".join(lines[:4])
    assert f"{len(lines) - 4} systems have no record; run it again" in capsys.readouterr().err
    path.write_text("".join(lines), encoding="utf-8")


def test_a_folder_of_another_run_is_refused(run: Path) -> None:
    with pytest.raises(ValueError, match=r"holds a run of .*'seed': 1.*; name another"):
        main([*COMMAND, "--seed", "2", "--output", str(run)])


def test_the_pair_has_the_embedded_models_sizes() -> None:
    from d2f_export.embedded import RECIPES

    pair, embedded = OPEN_TEXT["pair"].training.config, RECIPES["embedded"].config
    assert replace(pair, vocab_size=1024, num_tokens=1024, eos_ids=(EOS_ID,)) == embedded
