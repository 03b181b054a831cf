"""Where English documentation lies on a machine: docstrings, comments, README files.

Reads the files of installed Python packages in place, by `ast` and patterns; imports none of them.
Knows nothing of what makes a text good. What is read stays on the machine: packages have many
licences, and neither this repository nor a model folder holds any of their text.
"""

import ast
import os
import re
import site
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

__all__ = ["find_files", "installed_roots", "texts"]

PYTHON: Final = (".py", ".pyi")
HEADERS: Final = (".h", ".hpp", ".cuh")
PLAIN: Final = (".md", ".rst", "METADATA")
MAX_BYTES: Final = 1_000_000  # beyond lie generated tables, slow to parse
SKIPPED_FOLDERS: Final = frozenset(("__pycache__", "test", "tests", "node_modules", ".git"))
HASHES: Final = re.compile(r"(?:^[ \t]*#(?!!).*\n){3,}", re.M)
SLASHES: Final = re.compile(r"/\*\*.*?\*/|(?:^[ \t]*//.*\n){3,}", re.M | re.S)
MARGIN: Final = re.compile(r"^[ \t]*(?:#+|//[/!]?|/\*\*|\*/|\*)?<? ?|\*/", re.M)


def installed_roots() -> list[Path]:
    """Return the folders of the standard library and of all installed packages."""
    names = [sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib")]
    found = [Path(name).resolve() for name in (*names, *site.getsitepackages())]
    return [path for path in dict.fromkeys(found) if path.is_dir()]


def find_files(roots: Iterable[Path]) -> list[tuple[Path, str]]:
    """Return every documentation file once, with its path inside its root, in order of that."""
    found: dict[Path, str] = {}
    for root in roots:
        for folder, inner, names in os.walk(root):
            inner[:] = sorted(name for name in inner if name not in SKIPPED_FOLDERS)
            for name in names:
                if name.endswith((*PYTHON, *HEADERS, *PLAIN)):
                    path = Path(folder, name)
                    found.setdefault(path.resolve(), path.relative_to(root).as_posix())
    return sorted(found.items(), key=lambda item: (item[1], item[0]))


def texts(path: Path) -> Iterator[str]:
    """Yield the texts of one file; nothing where it cannot be read as UTF-8 or parsed."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return
    if path.name.endswith(PYTHON):
        yield from _docstrings(source)
        yield from (MARGIN.sub("", block) for block in HASHES.findall(source))
    elif path.name.endswith(HEADERS):
        yield from (MARGIN.sub("", block) for block in SLASHES.findall(source))
    else:
        yield source


def _docstrings(source: str) -> Iterator[str]:
    if '"""' not in source and "'''" not in source:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in _statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Walk what may hold a definition; ast.walk also visits expressions, at thrice the time."""
    waiting: list[ast.AST] = [tree]
    for node in waiting:
        yield node
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            waiting.extend(getattr(node, name, ()))
