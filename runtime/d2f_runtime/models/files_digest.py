"""The digest of a model's files: equal where they were copied, whatever their folder is called.

Weights are too large to be read whole just for this: of a large file its name, its size and pieces
all over it count. Training, merging and quantizing change weights everywhere; who changes a few of
them by hand, and nothing else, is not found out.
"""

from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Final

__all__ = ["digest_of_files"]

TEXTS: Final = (".json", ".jinja", "merges.txt")
"""What the names of tokenizer, template and config files end with."""
WHOLE_BYTES: Final = 1 << 25
PIECES: Final = 1024
PIECE_BYTES: Final = 4096
DIGEST_BYTES: Final = 8


def digest_of_files(*folders: Path, weights: str) -> str:
    """Return the digest of the files that make a model, in hex. Blocks for some milliseconds.

    Args:
        folders: of the model and of its adapter; either may be a file.
        weights: what the names of its weights' files contain, ".safetensors".
    """
    digest = blake2b(digest_size=DIGEST_BYTES)
    for folder in folders:
        for path in _files(folder, weights):
            size = path.stat().st_size
            digest.update(f"{path.name if folder.is_dir() else ''} {size}\n".encode())
            with path.open("rb", buffering=0) as file:
                for start, num_bytes in _pieces(size):
                    file.seek(start)
                    digest.update(file.read(num_bytes))
    return digest.hexdigest()


def _files(folder: Path, weights: str) -> list[Path]:
    if not folder.is_dir():
        return [folder]
    named = (path for path in folder.iterdir() if path.name.endswith(TEXTS) or weights in path.name)
    return sorted(path for path in named if path.is_file())


def _pieces(size: int) -> Iterable[tuple[int, int]]:
    """Yield where pieces begin, and how long they are, bytes: one where all of a file counts."""
    if size <= WHOLE_BYTES:
        yield 0, size
        return
    for number in range(PIECES):
        yield (size - PIECE_BYTES) * number // (PIECES - 1), PIECE_BYTES
