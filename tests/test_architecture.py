"""Who may import whom: the rooms of the packages, held by reading their imports.

A room is a package or, where a package is split, a part of it. docs/architecture.md draws them.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ["d2f_stream", "runtime/d2f_runtime", "export/d2f_export", "lab"]
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

CORE = "d2f_stream.core"
PURE = {"d2f_runtime.decoding"}
MODEL = {CORE, "d2f_runtime.text", "d2f_runtime.gguf"}
MODEL |= {"d2f_runtime." + n for n in ("cpus", "kernels", "models", "quantization")}
RUN = MODEL | PURE | {"d2f_runtime.backends"}
SDK = {CORE, "d2f_stream.wire", "d2f_stream.channels"}
STREAMS = SDK | {"d2f_stream.server.auth", "d2f_stream.server.limits"}
STREAMS |= {"d2f_stream.server." + n for n in ("logins", "peer_log", "streams", "http")}
RUNTIME = RUN | {"d2f_runtime.device", "d2f_runtime.loaded_model"}
RUNTIME |= {"d2f_runtime.engine", "d2f_runtime.evaluation", "d2f_runtime.provenance"}

# What a room may import of the others; a room may always import itself.
ROOMS: dict[str, set[str]] = {
    "d2f_stream.core": {"d2f_stream"},
    "d2f_stream.wire": {CORE},
    "d2f_stream.channels": {CORE, "d2f_stream.wire"},
    "d2f_stream.client": SDK,
    "d2f_stream.schema": {CORE, "d2f_stream.wire"},
    "d2f_stream.server.limits": {CORE},
    "d2f_stream.server.auth": {CORE},
    "d2f_stream.server.peer_log": {CORE},
    "d2f_stream.server.logins": {"d2f_stream.server.peer_log"},
    "d2f_stream.server.settings": {CORE, "d2f_stream.server.auth", "d2f_stream.server.limits"},
    "d2f_stream.server.listening": {CORE, "d2f_stream.channels"}
    | {"d2f_stream.server." + n for n in ("peer_log", "settings")},
    "d2f_stream.server.streams": STREAMS,
    "d2f_stream.server.http": STREAMS,
    "d2f_stream.server.openai": STREAMS,
    "d2f_stream.server.ollama": {
        "d2f_stream",
        "d2f_stream.server.openai",
        "d2f_stream.server.logins",
    }
    | STREAMS,
    "d2f_stream.server.mqtt": STREAMS,
    "d2f_stream.cluster": {"d2f_stream", "d2f_stream.client", "d2f_runtime.engine"} | STREAMS,
    "d2f_stream.server": {
        "d2f_stream",
        "d2f_stream.api",
        "d2f_stream.cluster",
        "d2f_runtime.engine",
    }
    | STREAMS
    | {"d2f_stream.server." + n for n in ("openai", "ollama", "mqtt", "listening", "settings")},
    "d2f_stream.transformers_streamer": {CORE},
    "d2f_stream.api": SDK
    | {"d2f_stream.client", "d2f_runtime.engine", "d2f_stream.transformers_streamer"},
    "d2f_stream.background": {CORE},
    "d2f_stream.parser": {CORE},
    "d2f_stream.sync": {"d2f_stream", "d2f_stream.api", "d2f_stream.background", CORE},
    "d2f_stream.cli": {"d2f_stream", "d2f_stream.terminal", "d2f_stream.api", "d2f_stream.server"}
    | SDK
    | RUNTIME
    | {"d2f_export"},
    "d2f_stream.__main__": {"d2f_stream.cli"},
    "d2f_stream.terminal": {"d2f_stream", CORE}
    | {"d2f_stream." + n for n in ("api", "parser", "server")}
    | RUNTIME,
    "d2f_stream": {CORE, "d2f_stream.api", "d2f_stream.sync"},
    "d2f_runtime.decoding": {CORE},
    "d2f_runtime.kernels": MODEL,
    "d2f_runtime.quantization": MODEL,
    "d2f_runtime.models": MODEL,
    "d2f_runtime.gguf": {CORE},
    "d2f_runtime.text": {CORE, "d2f_runtime.gguf"},
    "d2f_runtime.backends": RUN,
    "d2f_runtime.device": {CORE},
    "d2f_runtime.loaded_model": RUN | {"d2f_runtime.device", "d2f_runtime.prefix_cache"},
    "d2f_runtime.prefix_cache": {"d2f_runtime.models"},
    "d2f_runtime.engine": RUN | {"d2f_runtime.device", "d2f_runtime.loaded_model"},
    "d2f_runtime.evaluation": {"d2f_stream", "d2f_stream.parser"} | RUNTIME,
    "d2f_runtime": set(),
    "d2f_runtime.cpus": set(),
    "d2f_runtime.provenance": {"d2f_stream", CORE, "d2f_runtime.cpus"},
    "d2f_export.distill": {"d2f_stream", "d2f_stream.parser"} | RUNTIME,
    "d2f_export.onnx": {"d2f_stream", "d2f_stream.parser"} | RUNTIME,
    "d2f_export": set(),
    "lab": set(),  # anything: no other room names it
}
# Modules that state what happens, and import nothing that makes it happen.
PURE_ROOMS = (
    "d2f_runtime.decoding",
    "d2f_runtime.prefix_cache",
    "d2f_stream.core",
    "d2f_stream.wire",
)
PURE_EXCEPTIONS = {"d2f_stream.core.session", "d2f_stream.core.buffer"}
HEAVY = {"torch", "numpy", "onnxruntime", "onnx", "transformers", "tokenizers", "jinja2", "rich"}
IMPURE = {"asyncio", "threading", "time", "logging", "random", "os", "socket"}


def name_of(path: Path) -> str:
    package = next(p for p in PACKAGES if path.is_relative_to(ROOT / p))
    parts = path.relative_to((ROOT / package).parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """Return the longest room that holds the module."""
    holding = [room for room in ROOMS if module == room or module.startswith(room + ".")]
    return max(holding, key=len)


def imports(tree: ast.AST, *, top_only: bool) -> Iterator[str]:
    for node in tree.body if top_only and isinstance(tree, ast.Module) else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_module_imports_what_its_room_may(path: Path) -> None:
    name, tree = name_of(path), ast.parse(path.read_text(encoding="utf-8"))
    every, first = set(imports(tree, top_only=False)), set(imports(tree, top_only=True))
    room = room_of(name)
    ours = {room_of(module) for module in every if module.startswith(("d2f_", "lab."))}
    if room != "lab":
        assert ours - {room} <= ROOMS[room]
    if name.startswith(PURE_ROOMS) and name not in PURE_EXCEPTIONS:
        assert not {module for module in every if module.partition(".")[0] in IMPURE | HEAVY}
    if name.startswith(("d2f_stream", "d2f_runtime.engine")) and name not in {
        "d2f_stream.terminal.answer",
        "d2f_stream.terminal.canvas",
        "d2f_stream.terminal.chat",
    }:
        assert not {module for module in first if module.partition(".")[0] in HEAVY}
