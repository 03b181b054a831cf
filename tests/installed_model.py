"""The model package of the repository as if it were installed, with an end to its answers.

Those of the package itself go on for 256 tokens, which no test has to wait for.
"""

import json
import os
from pathlib import Path
from typing import Final

CHATS: Final = Path(__file__).parents[1] / "models/smollm2-135m-d2f/smollm2_135m_d2f/model"
LONGEST: Final = 64  # tokens
METADATA: Final = "Metadata-Version: 2.1\nName: smollm2-135m-d2f\nVersion: 0.1.0\n"
ENTRY_POINT: Final = "[d2f_stream.models]\nsmollm2-135m-d2f = brief_model:FOLDER\n"


def brief_model(folder: Path) -> Path:
    """Return a folder of links to the package's files, whose answers end after LONGEST tokens."""
    model = folder / "brief-model"
    model.mkdir()
    for path in CHATS.iterdir():
        (model / path.name).symlink_to(path)
    manifest = json.loads((CHATS / "manifest.json").read_text("utf-8"))
    manifest["defaults"]["cpu"]["max_new_tokens"] = LONGEST
    (model / "manifest.json").unlink()
    (model / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    return model


def python_path(folder: Path) -> str:
    """Return a PYTHONPATH with which a process takes the package for installed."""
    (folder / "brief_model.py").write_text(
        f"from pathlib import Path\n\nFOLDER = Path({str(brief_model(folder))!r})\n"
    )
    described = folder / "smollm2_135m_d2f-0.1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(METADATA)
    (described / "entry_points.txt").write_text(ENTRY_POINT)
    return os.pathsep.join(path for path in (str(folder), os.environ.get("PYTHONPATH")) if path)
