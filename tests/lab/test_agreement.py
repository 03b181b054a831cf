import json
from pathlib import Path

import pytest

from lab.bench.agreement import main

pytestmark = pytest.mark.torch

CHECKPOINT = Path(__file__).parents[2] / "export" / "checkpoints" / "word-problems"


@pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="needs the embedded model's checkpoint")
def test_quantised_answers_are_compared_with_the_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found.json"
    main(
        [str(CHECKPOINT), "--device=cpu", "--reference=fp32", "--quantization=fp32",
         "--quantization=nf4", "--problems=2", "--prompts=1", f"--output={output}"]
    )  # fmt: skip
    record = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out) == record
    assert "lab.bench.agreement" in record["command"]
    found = record["results"]
    assert "agreement" not in found["fp32"]
    assert found["nf4"]["agreement"]["num_proposals"] > 10
    # another quantisation proposes mostly, but not surely, the same
    assert 0.8 < found["nf4"]["agreement"]["token_agreement"] <= 1.0
    assert found["nf4"]["agreement"]["mean_confidence_error"] > 0
    assert found["nf4"]["accuracy"]["num_problems"] == 2
