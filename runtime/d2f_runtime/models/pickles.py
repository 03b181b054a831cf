"""Pickled weights: recognised, so that they can be refused. Reading one can run any code."""

from pathlib import Path
from typing import Final

from d2f_stream.core.errors import UnsupportedModel

__all__ = ["refuse_pickles"]

PICKLED: Final = (".bin", ".pt", ".pth", ".ckpt")


def refuse_pickles(folder: Path) -> None:
    """Say what is wrong with a folder whose weights are pickled; call it where others are missing.

    Raises:
        UnsupportedModel: it holds a pickle.
    """
    pickled = sorted(file.name for file in folder.iterdir() if file.name.endswith(PICKLED))
    if pickled:
        raise UnsupportedModel(
            f"{folder} holds pickled weights only ({pickled[0]}), and reading a pickle can run any "
            "code; fetch or convert them to safetensors"
        )
