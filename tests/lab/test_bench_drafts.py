"""The bench of drafts: what it measures of an adapter that was trained."""

import json
from pathlib import Path

import pytest

from d2f_export.distill.from_ar.base import open_ar_base
from d2f_export.distill.from_ar.examples import read_examples
from d2f_export.distill.from_ar.run import train_draft
from d2f_export.distill.from_ar.settings import DraftSettings
from lab.bench.drafts import main
from tiny_checkpoints import write_model

pytestmark = pytest.mark.torch


def test_bench_measures_an_adapter_that_was_trained(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    base, data = tmp_path / "base", tmp_path / "d.jsonl"
    write_model(base, "qwen2")
    lines = [{"prompt": f"Ann has {n}", "answer": f"{n} apples, and so on"} for n in range(12)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = DraftSettings(
        from_ar=str(base), data=(str(data),), rank=4, rows=1, clean_length=128, noisy_length=128,
        steps=3, block_sizes=(2, 4),
    )  # fmt: skip
    train_draft(settings, tmp_path / "run", cpu=True)
    read_examples(settings, open_ar_base(str(base)))[0].write(tmp_path / "held.npz")
    output = tmp_path / "record.json"
    main(
        ["--base", str(base), "--adapter", str(tmp_path / "run"), "--cpu", "--rows", "1",
         "--held-out", str(tmp_path / "held.npz"), "--prompts", f"sums={data}", "--number", "3",
         "--grid", "2:10:no", "4:500:yes", "--max-new", "12", "--timed", "1",
         "--output", str(output)]
    )  # fmt: skip
    results = json.loads(output.read_text())["results"]
    assert [found["block_size"] for found in results["one_step"]] == [2, 4]
    assert all(1.0 <= found["length"] <= found["block_size"] + 1 for found in results["one_step"])
    assert all(found["same_as_ar"] == 1.0 for found in results["decoding"])
    assert results["decoding"][0]["sums"] == results["decoding"][0]["tokens_per_step"]
