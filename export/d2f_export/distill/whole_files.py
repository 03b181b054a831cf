"""Files that are whole or not there: written beside their name, which they get at the end."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from safetensors.torch import save_file
from torch import Tensor

__all__ = ["replacing", "write_peft", "write_text"]

CONFIG_FILE: Final = "adapter_config.json"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield where to write a file; it replaces the one at `path` if nothing went wrong."""
    partial = path.with_name(f".{path.name}")
    yield partial
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_peft(folder: Path, weights: dict[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write an adapter in PEFT's format; its config, without which it is none, comes last.

    Args:
        folder: made where needed; files of these names are replaced.
        weights: on the CPU, contiguous, by PEFT's names.
        config: of adapter_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    with replacing(folder / "adapter_model.safetensors") as partial:
        save_file(weights, partial, metadata={"format": "pt"})
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
