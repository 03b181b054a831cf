import tomllib
from pathlib import Path
from typing import Any

import pytest

from d2f_export.distill.command import build_parser, values_of
from d2f_export.distill.settings import DistillSettings, build_settings, read_settings, to_toml
from d2f_stream.core.errors import InvalidParams, InvalidRequest

GIVEN: dict[str, Any] = {"model": "org/model", "data": ["a.jsonl", 'b "quoted" \\ ü.jsonl']}


def test_settings_survive_their_file() -> None:
    settings = build_settings(
        DistillSettings,
        GIVEN | {"low": 0.1, "full": True, "score": "regex", "score_pattern": r"\d+"},
    )
    assert build_settings(DistillSettings, tomllib.loads(to_toml(settings))) == settings


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"length": 1}, "length is 1 but must be int >= 2"),
        ({"low": 0.8}, "low is 0.8 but must be at most high, which is 0.7"),
        ({"lr": float("nan")}, "lr is nan but must be a finite number"),
        ({"steps": 1.5}, "steps is 1.5 but must be int"),
        ({"schedule": "linear"}, "schedule is 'linear' but must be one of .*monotone"),
        ({"data": []}, "data is .* but must be array of length >= 1"),
        ({"forward_kl": 0.0}, "forward_kl is 0 but must be above 0"),
        ({"patience": 2}, "patience is 2 but must be 0 without a validation file"),
        ({"score": "regex"}, "score_pattern is None but must be given"),
        ({"score": "regex", "score_pattern": "("}, r"a regular expression \(missing \)"),
        ({"rank": 3}, "setting is 'rank' but must be one of .*lora_rank"),
    ],
)
def test_bad_settings_are_refused_by_name(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidParams, match=message):
        build_settings(DistillSettings, GIVEN | changed)


def test_missing_setting_says_how_to_give_it() -> None:
    with pytest.raises(InvalidRequest, match="data is missing; give --data"):
        build_settings(DistillSettings, {"model": "org/model"})


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "org/model"\ndata = ["a"]\nlr = 0.5\nsteps = 7\n')
    args = build_parser("distill").parse_args(
        [
            "--output",
            "x",
            "--config",
            str(file),
            "--steps",
            "3",
            "--no-checkpointing",
            "--data",
            "b",
            "c",
        ]
    )
    settings = build_settings(DistillSettings, values_of(args))
    assert settings == DistillSettings(
        model="org/model", data=("b", "c"), lr=0.5, steps=3, checkpointing=False
    )


def test_broken_file_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("model = ")
    with pytest.raises(InvalidRequest, match="is not valid TOML"):
        read_settings(tmp_path / "run.toml")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_settings(tmp_path / "nowhere.toml")
