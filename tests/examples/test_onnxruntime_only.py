import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "onnxruntime_only.py"


def test_an_exported_model_needs_onnxruntime_alone(tmp_path: Path) -> None:
    """Nothing of d2f_stream can be imported where it runs."""
    (tmp_path / "d2f_stream.py").write_text("raise ImportError('not on this device')")
    (tmp_path / "d2f_runtime.py").write_text("raise ImportError('not on this device')")
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("12 + 3 = 15 apples. The answer is 15.")
