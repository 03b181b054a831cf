"""The Triton that is installed has what kernels take from it, told without a GPU to compile for.

Triton renames parts of Gluon between versions; a kernel with such a name fails where it is
compiled, and every model then runs the plain step.
"""

import ast
from pathlib import Path

import pytest

import d2f_runtime.kernels
from d2f_runtime.kernels import gluon, language

KERNELS = sorted(Path(d2f_runtime.kernels.__file__ or "").parent.glob("*.py"))
KERNELS.remove(Path(gluon.__file__))  # which takes the name that there is
MODULES = {
    "tl": language.tl,
    **{name: getattr(gluon, name) for name in ("gl", "mbarrier", "tma")},
}

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(not gluon.HAS_GLUON, reason="needs triton"),
]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: str(path.stem))
def test_triton_has_what_kernels_name(path: Path) -> None:
    named = {
        (node.value.id, node.attr)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    missing = [
        f"{module}.{name}"
        for module, name in named
        if module in MODULES and not hasattr(MODULES[module], name)
    ]
    assert not missing
