"""The settings of the decoder that are compared, and the command that compares them."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2f_export.onnx.whole_matrices import pack_int8
from d2f_runtime.models.checkpoints import save_checkpoint
from d2f_runtime.models.transformer import Transformer
from lab.ablations.__main__ import main
from lab.ablations.thresholds import FactorPolicy, round_weights, settings
from lab.embedded_model.recipe import RECIPES
from lab.embedded_model.tokenizer_training import train_tokenizer

pytestmark = pytest.mark.torch

FIGURES = {"num_problems": 1, "accuracy": 0.5, "tokens_per_step": 7.0}


def records(path: Path, *, without: int = 0) -> Path:
    """A record of every setting but the last ones, with made-up figures."""
    every = [setting.to_dict() for setting in settings()]
    figures = {"model": path.parent.name, **FIGURES}
    lines = [json.dumps({**figures, "setting": s}) for s in every[: len(every) - without]]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_every_setting_is_another_one() -> None:
    texts = [json.dumps(setting.to_dict()) for setting in settings()]
    assert len(set(texts)) == len(texts)


@given(st.lists(st.integers(0, 64).map(lambda n: n / 64), min_size=1, max_size=9))
def test_factor_rule_takes_the_most_that_its_definition_allows(confidence: list[float]) -> None:
    ordered = sorted(confidence, reverse=True)
    # (n + 1)(1 - confidence of the n-th) only grows with n
    expected = sum((n + 1) * (1 - c) < 1 for n, c in enumerate(ordered, 1))
    masked = range(len(confidence))
    taken = FactorPolicy().accept(masked, confidence, confidence, fully_activated=False)
    assert len(taken) == expected
    assert sorted((confidence[offset] for offset in taken), reverse=True) == ordered[:expected]


def test_command_runs_what_the_file_lacks(tmp_path: Path) -> None:
    train_tokenizer(seed=1, num_problems=500).save(str(tmp_path / "tokenizer.json"))
    save_checkpoint(tmp_path, Transformer(RECIPES["tiny"].config))
    output = records(tmp_path / "records.jsonl", without=1)
    with output.open("a") as file:
        file.write('{"model": "half')
    main(["thresholds", str(tmp_path), "--output", str(output), "--problems", "1"])
    *_, last = settings()
    lines = output.read_text().splitlines()
    line = lines[-1]
    assert len(lines) == len([*settings()])
    assert json.loads(line)["setting"] == last.to_dict()
    record = json.loads(line)
    assert record["num_problems"] == 1
    assert record["right"] == str(int(record["accuracy"]))
    [tokens], [steps] = record["tokens"], record["steps"]
    assert record["tokens_per_step"] == pytest.approx(tokens / steps, abs=1e-4)
    origin = json.loads((tmp_path / "records.runs.jsonl").read_text())
    assert origin["command"].startswith("python -m lab.ablations")


def test_rules_are_drawn_for_each_block_size(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    source, picture = records(tmp_path / "records.jsonl"), tmp_path / "thresholds.png"
    main(["plot", str(source), "--output", str(picture)])
    assert picture.stat().st_size > 10_000


def test_rounded_weights_are_those_of_an_int8_artefact() -> None:
    model = Transformer(RECIPES["tiny"].config)
    model.init_weights(0)
    rounded = deepcopy(model)
    round_weights(rounded)
    for name, weight in rounded.named_parameters():
        given = model.get_parameter(name)
        if weight.dim() == 1:
            assert torch.equal(weight, given)
            continue
        levels, scales = pack_int8([given.detach()])
        assert torch.equal(weight, torch.from_numpy(levels.T * scales[:, None]))
