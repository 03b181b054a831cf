"""The model package of the repository as if it were installed: its code, and its entry point."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "models" / "smollm2-135m-d2f"
METADATA = "Metadata-Version: 2.1\nName: smollm2-135m-d2f\nVersion: 0.1.0\n"
ENTRY_POINT = "[d2f_stream.models]\nsmollm2-135m-d2f = smollm2_135m_d2f:FOLDER\n"


def python_path(folder: Path) -> str:
    """Return a PYTHONPATH with which a process takes the package for installed."""
    described = folder / "smollm2_135m_d2f-0.1.0.dist-info"
    described.mkdir(exist_ok=True)
    (described / "METADATA").write_text(METADATA)
    (described / "entry_points.txt").write_text(ENTRY_POINT)
    paths = [str(PACKAGE), str(folder), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(path for path in paths if path)
