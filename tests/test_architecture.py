"""Who may import whom: the layers of the packages, held by reading their imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ["d2f_stream", "runtime/d2f_runtime", "export/d2f_export"]
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

VALUES = {"d2f_stream.errors", "d2f_stream.params"}
EVENTS = VALUES | {"d2f_stream.events"}
SESSION = EVENTS | {"d2f_stream.buffer"}
SERVED = EVENTS | {"d2f_stream.protocol", "d2f_stream.session", "d2f_stream.server.limits"}
CONNECTION = SERVED | {"d2f_stream.channels"}
CONNECTION |= {"d2f_stream.server." + n for n in ("auth", "served_stream", "streams")}
PURE = VALUES | {
    "d2f_runtime." + n for n in ("window", "policy", "adaptive", "partition", "blocks", "lookahead")
}

# What a module of ours may import of ours. Others are bounded by is_forbidden only.
ALLOWED = {
    "d2f_stream.errors": set(),
    "d2f_stream.params": VALUES,
    "d2f_stream.events": VALUES,
    "d2f_stream.buffer": EVENTS,
    "d2f_stream.session": SESSION,
    "d2f_stream.protocol": EVENTS,
    "d2f_stream.codec": {"d2f_stream.errors", "d2f_stream.protocol"},
    "d2f_stream.channels": {"d2f_stream.codec"},
    "d2f_stream.channels.memory": {"d2f_stream.channels", "d2f_stream.codec"},
    "d2f_stream.backoff": {"d2f_stream.errors"},
    "d2f_stream.remote": SESSION | {"d2f_stream.protocol", "d2f_stream.session"},
    "d2f_stream.conversation": SESSION
    | {"d2f_stream.codec", "d2f_stream.protocol", "d2f_stream.remote"},
    "d2f_stream.topics": EVENTS | {"d2f_stream.codec", "d2f_stream.protocol"},
    "d2f_stream.broker": {"d2f_stream.errors"},
    "d2f_stream.channels.mqtt": {
        "d2f_stream." + n for n in ("broker", "channels.mqtt_connection", "errors")
    },
    "d2f_stream.channels.mqtt_connection": {"d2f_stream.broker", "d2f_stream.errors"},
    "d2f_stream.channels.websocket": {
        "d2f_stream." + n for n in ("channels", "codec", "errors", "protocol")
    },
    "d2f_stream.server.limits": {"d2f_stream.errors"},
    "d2f_stream.server.auth": {"d2f_stream.errors"},
    "d2f_stream.server.settings": {"d2f_stream.errors"}
    | {"d2f_stream.server." + n for n in ("auth", "limits")},
    "d2f_stream.server.served_stream": SERVED,
    "d2f_stream.server.streams": SERVED | {"d2f_stream.server.served_stream"},
    "d2f_stream.server.connection": CONNECTION,
    "d2f_stream.server.gateway": CONNECTION | {"d2f_stream.server.connection"},
    "d2f_runtime.window": set(),
    "d2f_runtime.decoder": PURE,
    "d2f_runtime.adaptive": set(),
    "d2f_runtime.policy": PURE,
    "d2f_runtime.lookahead": PURE,
    "d2f_runtime.partition": PURE,
    "d2f_runtime.blocks": PURE,
    "d2f_runtime.noise": PURE,
    "d2f_runtime.scheduler": PURE,
    "d2f_runtime.detokenizer": PURE,
}
ENGINE = PURE | SESSION | {"d2f_stream.session"}
ENGINE |= {"d2f_runtime." + n for n in ("backends.base", "decoder", "detokenizer", "noise")}
ENGINE |= {"d2f_runtime." + n for n in ("scheduler", "stream", "step_loop", "loaded_model")}
ENGINE |= {"d2f_runtime." + n for n in ("denoiser", "early_requests", "limits")}
ENGINE |= {"d2f_runtime." + n for n in ("planned_step", "step_queue")}
ENGINE |= {"d2f_runtime.device", "d2f_runtime.hub", "d2f_runtime.tokenizer"}
ALLOWED |= {"d2f_runtime." + n: ENGINE for n in ("stream", "step_loop", "loaded_model", "engine")}
CORE = {"engine", "step_loop", "stream", "scheduler", "loaded_model", "opening"}
HEAVY = {"torch", "numpy", "onnxruntime", "onnx", "transformers", "tokenizers", "jinja2", "rich"}
APPLICATION = {"api", "cli", "client", "server"}
SERVED_BENCH = {"d2f_runtime.bench." + n for n in ("served_model", "serving", "serving_hostile")}
IMPURE = {"asyncio", "threading", "time", "logging", "random", "os"}


def name_of(path: Path) -> str:
    package = next(p for p in PACKAGES if path.is_relative_to(ROOT / p))
    parts = path.relative_to((ROOT / package).parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, *, top_only: bool) -> Iterator[str]:
    for node in tree.body if top_only and isinstance(tree, ast.Module) else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def is_forbidden(name: str, module: str) -> bool:
    """Whether module `name` must not import `module`, wherever in its code."""
    root, _, rest = module.partition(".")
    if name.startswith("d2f_stream"):
        return root == "d2f_export"
    if name.startswith("d2f_runtime"):
        inner = name.split(".")[1:2]
        is_low = inner and inner[0] in {"backends", "models", "kernels", "quantization"}
        return (
            root == "d2f_export"
            or (
                root == "d2f_stream"
                and rest.split(".")[0] in APPLICATION
                and name not in SERVED_BENCH  # they measure the server, so they run one
            )
            or (bool(is_low) and root == "d2f_runtime" and rest in CORE)
            or (ALLOWED.get(name) in (set(), PURE) and root in IMPURE | HEAVY)
            or (bool(inner) and inner[0] in CORE and root in HEAVY)
        )
    return False


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_module_imports_what_it_may(path: Path) -> None:
    name, tree = name_of(path), ast.parse(path.read_text(encoding="utf-8"))
    every, first = set(imports(tree, top_only=False)), set(imports(tree, top_only=True))
    ours = {module for module in every if module.startswith("d2f_")}
    assert not {module for module in every if is_forbidden(name, module)}
    if name in ALLOWED:
        assert ours <= ALLOWED[name]
    if name.startswith("d2f_stream") and name not in {"d2f_stream.canvas"}:
        assert not {module for module in first if module.partition(".")[0] in HEAVY}
