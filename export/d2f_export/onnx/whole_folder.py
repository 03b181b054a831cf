"""A folder that appears under its name only when everything in it is written.

It is filled under a hidden name beside the final one. An error removes it; a process that is killed
leaves it there, where nothing reads it.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["whole_or_absent"]


@contextmanager
def whole_or_absent(target: Path) -> Iterator[Path]:
    """Give a folder that becomes `target` at the end, in place of an older one.

    Raises:
        OSError: it cannot be made or renamed; the older one stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp's are private
        _replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replace(folder: Path, target: Path) -> None:
    """Give `folder` the name `target`; an old one steps aside first and is then removed."""
    if not target.exists():
        os.rename(folder, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    os.rename(target, old / target.name)
    try:
        os.rename(folder, target)
    except OSError:
        os.rename(old / target.name, target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
