"""SmolLM2-135M-Instruct for d2f-stream: the folder of its files; see the package's README."""

from pathlib import Path
from typing import Final

__all__ = ["FOLDER"]

FOLDER: Final = Path(__file__).resolve().parent / "model"
