"""The kernels' tests on a machine without a GPU: in Triton's interpreter, in a process of its own.

The interpreter is switched on by the environment, before any kernel is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d2f_runtime.kernels.language import HAS_TRITON

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(not HAS_TRITON, reason="needs triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels' tests run on the GPU"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="they run here already"),
]

HERE = Path(__file__).parent


@pytest.mark.timeout(600)
def test_interpreted_kernels_equal_their_references() -> None:
    tests = ["kernels", "test_fast_runner.py::test_interpreted_kernels_decode_the_same"]
    tests += ["test_draft_adapter.py::test_interpreted_kernels_draft_as_the_plain_step"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", *(str(HERE / t) for t in tests)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout
