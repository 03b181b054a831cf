import json
from pathlib import Path

import pytest

import triton_mode  # noqa: F401  # isort: skip  # before the kernels

from d2f_stream.core.errors import InvalidParams
from lab.bench.__main__ import main
from lab.bench.step_models import SHAPES, floor_bytes

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("runner", ["plain", "fast"])
def test_a_tiny_model_is_timed_on_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], runner: str
) -> None:
    output = tmp_path / "step.json"
    main(
        ["step", "--shape=tiny", "--quantization=fp32", "--device=cpu", "--cached=16", "--width=8",
         "--rate=10", "--steps=4", f"--runner={runner}", f"--output={output}"]
    )  # fmt: skip
    found = json.loads(output.read_text())["results"]["tiny fp32"]
    assert json.loads(capsys.readouterr().out)["tiny fp32"] == found
    assert found["runner"].startswith(runner)
    assert found["window 8"]["backend_ms"]["median"] > 0
    assert found["engine at 10"]["wall_ms"]["count"] >= 1
    assert found["engine at 10"]["tokens_per_step"] > 3


def test_nothing_new_begins_when_the_time_is_up(capsys: pytest.CaptureFixture[str]) -> None:
    main(["step", "--shape=tiny", "--quantization=fp32", "--device=cpu", "--seconds=0"])
    found = json.loads(capsys.readouterr().out)["tiny fp32"]
    assert found["window 32"] == found["engine at 10"] == "left out: the time was up"


@pytest.mark.parametrize("flag", ["--shape=900b", "--quantization=int3"])
def test_unknown_names_are_refused_with_the_known_ones(flag: str) -> None:
    with pytest.raises(InvalidParams, match="one of"):
        main(["step", "--device=cpu", flag])


def test_the_floor_of_llada_is_its_weights_and_cache() -> None:
    llada = SHAPES["llada-8b"]
    found = {q: floor_bytes(llada, quantization=q, cached=0) for q in ("bf16", "fp8", "nf4")}
    assert found["bf16"] == pytest.approx(15.0e9, rel=0.01)
    assert found["fp8"] == pytest.approx(7.5e9, rel=0.01)
    assert found["nf4"] == pytest.approx(4.75e9, rel=0.01)
    cached = floor_bytes(llada, quantization="fp8", cached=640)
    assert cached - found["fp8"] == 640 * 32 * 2 * 4096 * 2


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_random_models_have_the_codes_alone(tmp_path: Path, quantization: str) -> None:
    output = tmp_path / "step.json"
    main(
        ["step", "--shape=tiny", f"--quantization={quantization}", "--device=cpu", "--cached=16",
         "--width=8", "--rate=10", "--steps=4", "--runner=fast", f"--output={output}"]
    )  # fmt: skip
    found = json.loads(output.read_text())["results"][f"tiny {quantization}"]
    assert found["window 8"]["backend_ms"]["median"] > 0
    assert found["weight_mb"] > 2 * 512 * 64 * 2 / 1e6  # the ends, in bf16
