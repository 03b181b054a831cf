"""Perplexities: that of a guess is known, and a graph in fp32 has that of its checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest

from d2f_export.distill.from_ar.answers import Answers
from lab.bench.perplexity import main, perplexity
from tiny_models import tiny_folder

pytestmark = pytest.mark.torch

ANSWERS = Answers.of([([5, 6, 7], [8, 9]), ([40], [41, 42, 43])])


def test_a_guess_among_all_tokens_has_their_number_for_perplexity() -> None:
    found = perplexity(
        lambda tokens, begin: np.zeros((len(tokens) - begin, 64), np.float32), ANSWERS
    )
    assert found == {"perplexity": 64.0, "likeliest": 0.0, "tokens": 5, "answers": 2}


def test_a_graph_predicts_what_its_checkpoint_does(tmp_path: Path) -> None:
    ANSWERS.write(tmp_path / "data.npz")
    output = tmp_path / "record.json"
    folders = [
        "--model",
        str(tiny_folder("llama", "fp32")),
        "--base",
        str(tiny_folder("llama", "torch")),
    ]
    main([*folders, "--data", str(tmp_path / "data.npz"), "--output", str(output)])
    results = json.loads(output.read_text())["results"]
    assert results["model"] == pytest.approx(results["base"], rel=1e-3)
    assert results["model"]["tokens"] == 5
