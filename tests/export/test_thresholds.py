"""The settings of the decoder that are compared, and the command that compares them."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2f_export.__main__ import main
from d2f_export.embedded_model.recipe import RECIPES
from d2f_export.embedded_model.tokenizer_training import train_tokenizer
from d2f_export.onnx.quantize import pack_int8
from d2f_runtime.models.checkpoints import save_checkpoint
from d2f_runtime.models.transformer import Transformer
from lab.ablations.thresholds import FactorPolicy, round_weights, settings
from lab.ablations.thresholds_gain import Curves, tables

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
    assert origin["command"].startswith("python -m d2f_export")


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


def curve(rule: str, value: float, right: str, steps: int) -> dict[str, Any]:
    """A record whose answers have 8 tokens each and take so many steps."""
    shape = {"block_size": 16, "max_active_blocks": 4, "add_threshold": 0.1}
    setting = {**shape, "activate_threshold": 0.95, "acceptance": rule}
    return {
        "setting": {**setting, "confidence_threshold": value},
        "right": right,
        "tokens": [8] * len(right),
        "steps": [steps] * len(right),
    }


def test_the_joint_rule_is_compared_at_the_speed_that_it_has(tmp_path: Path) -> None:
    points = [
        curve("token", 0.5, "1100" * 50, 1),  # 50 % at 8 tokens a step
        curve("token", 0.9, "1111" * 50, 4),  # 100 % at 2
        curve("joint", 0.5, "1101" * 50, 2),  # 75 % at 4, where the plain one would have 83.3
        curve("joint", 0.9, "1111" * 50, 8),  # slower than any plain one
    ]
    curves = Curves.of(points)
    speed = curves.speed[:, 2]
    assert curves.plain_at(16, speed)[0] == pytest.approx(50 + 50 * 4 / 6)
    (tmp_path / "records.jsonl").write_text("".join(f"{json.dumps(p)}\n" for p in points))
    rows = [line.split(" | ") for line in tables([tmp_path / "records.jsonl"]).splitlines()]
    assert rows[2][:4] == ["| 16", "0.5", "50.0 at 8.0", "75.0 at 4.0"]
    assert rows[2][4].startswith("\N{MINUS SIGN}8.3 (\N{MINUS SIGN}1")
    assert rows[2][5].startswith("\N{MINUS SIGN}50.0 (")
    assert rows[3][4] == "\N{EN DASH}"


def test_intervals_are_as_wide_as_those_of_a_binomial_share() -> None:
    curves = Curves.of([curve("token", 0.5, "1" * 900 + "0" * 100, 1)])
    assert curves.accuracy[1:].std() == pytest.approx(100 * (0.9 * 0.1 / 1000) ** 0.5, rel=0.1)


def test_records_of_other_problems_cannot_be_compared() -> None:
    with pytest.raises(SystemExit, match="all the same ones"):
        Curves.of([curve("token", 0.5, "11", 1), curve("joint", 0.5, "111", 1)])
