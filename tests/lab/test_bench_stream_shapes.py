import json
from pathlib import Path

import pytest

from d2f_stream.core.errors import InvalidParams
from lab.bench.__main__ import main
from lab.bench.stream_shapes import ShapeSettings

pytestmark = pytest.mark.torch

TINY = ["stream", "--shape=tiny", "--quantization=fp32", "--device=cpu", "--cached=32", "--steps=4"]


def test_whole_answers_of_a_tiny_shape_are_recorded_for_each_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "stream.json"
    main([*TINY, "--rate=4", "--rate=10", f"--output={output}"])
    found = json.loads(output.read_text())["results"]
    assert json.loads(capsys.readouterr().out) == found
    slow, quick = found["tiny fp32, 4 tokens a step"], found["tiny fp32, 10 tokens a step"]
    assert quick["tokens_per_step"] > slow["tokens_per_step"] > 3
    for each in (slow, quick):
        assert each["tokens_per_second"]["median"] > 0
        assert each["first_block_ms"]["median"] > 0
        assert each["around_backend_ms"]["count"] == each["wall_ms"]["count"]
        assert each["runner"] == "plain"


def test_model_that_cannot_be_made_leaves_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    main([*TINY, "--quantization=fp8", "--rate=10"])
    found = json.loads(capsys.readouterr().out)
    assert "fp8" in found["tiny fp8"]["failure"]
    assert found["tiny fp32, 10 tokens a step"]["tokens_per_step"] > 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"shapes": ["gpt-2"]}, "shape is 'gpt-2' but must be one of llada-8b, "),
     ({"quantizations": ["fp3"]}, "quantization is 'fp3' but must be one of fp32, ")],
)  # fmt: skip
def test_unknown_names_are_refused_before_anything_is_loaded(
    settings: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(InvalidParams, match=message):
        ShapeSettings(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stream"], "give --contender and --prompts, or --shape"),
        (["stream", "--contender=a="], "give --contender and --prompts, or --shape"),
        ([*TINY, "--contender=a="], "leave out --contender"),
    ],
)
def test_either_shapes_or_contenders(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
