"""The doctor: what is installed, which backends work here, and what a missing extra would bring.

Reads package metadata and imports none of the packages; trial.py runs the backends in processes of
their own.
"""

import importlib.metadata
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec

from d2f_stream import __version__
from d2f_stream.terminal.trial import Trial, try_in_subprocess

__all__ = ["Extra", "Package", "Report", "describe", "examine"]

BACKENDS: Final = {"onnx": ("onnxruntime", "edge"), "torch": ("torch", "torch")}
BRINGS: Final = {
    "edge": "the ONNX backend for CPUs, the embedded model's tokenizer, the live canvas",
    "edge-gpu": "the same with ONNX Runtime for NVIDIA GPUs, in place of edge",
    "torch": "the PyTorch backend, for checkpoints and GPUs",
    "export": "training, distillation and ONNX export (d2f-stream export, verify)",
    "serve": "d2f-stream serve: websocket, OpenAI's API, metrics, the chat page",
    "client": "connect() to a server's websocket",
    "chat": "d2f-stream chat, shell completion",
    "mqtt": "servers and clients behind an MQTT broker",
    "log": "several servers over one log (d2f-stream serve --log)",
    "cluster": "engines on a Ray cluster (d2f-stream serve --engines)",
    "eval": "d2f-stream eval: tasks of lm-evaluation-harness",
}
RELATED: Final = ("transformers", "bitsandbytes")  # told where installed
RIVALS: Final = ("onnxruntime", "onnxruntime-gpu")  # two distributions of one import package
OLDEST_ONNXRUNTIME: Final = (1, 23)  # the first that runs what is exported

_REQUIREMENT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_EXTRA: Final = re.compile(r"""extra\s*==\s*['"]([^'"]+)['"]""")


class Package(msgspec.Struct, frozen=True, kw_only=True):
    """A package that d2f-stream can use; `version` is None where it is not installed."""

    name: str
    version: str | None
    extras: tuple[str, ...]


class Extra(msgspec.Struct, frozen=True, kw_only=True):
    """A group of optional packages and the command that installs it."""

    name: str
    brings: str
    missing: tuple[str, ...]
    command: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the doctor found."""

    d2f_stream: str
    python: str
    platform: str
    trials: tuple[Trial, ...]
    packages: tuple[Package, ...]
    extras: tuple[Extra, ...]
    problems: tuple[str, ...]

    @property
    def works(self) -> bool:
        """Whether at least one backend works."""
        return any(trial.works for trial in self.trials)


def examine(
    *,
    version_of: Callable[[str], str | None] | None = None,
    try_backend: Callable[[str], Sequence[Trial]] | None = None,
) -> Report:
    """Look at this installation and try each backend.

    Args:
        version_of: the installed version of a package, or None.
        try_backend: runs an installed backend on each of its devices.
    """
    version_of = version_of or installed_version
    packages = _packages(version_of)
    versions = {package.name: package.version for package in packages}
    trials: list[Trial] = []
    for backend, (name, extra) in BACKENDS.items():
        if any(versions.get(variant) for variant in (name, f"{name}-gpu")):
            trials.extend((try_backend or try_in_subprocess)(backend))
        else:
            detail = f"{name} is not installed; run: {_install_command(extra)}"
            trials.append(Trial(backend=backend, device="-", works=False, detail=detail))
    return Report(
        d2f_stream=__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        trials=tuple(trials),
        packages=packages,
        extras=tuple(_extra(name, packages) for name in BRINGS),
        problems=tuple(_problems(version_of)),
    )


def describe(report: Report) -> str:
    """Write a report as text, at most 80 columns or so."""
    trials = [
        (trial.backend, trial.device, "works" if trial.works else "no", trial.detail)
        for trial in report.trials
    ]
    packages = [
        (package.name, package.version or "-", ", ".join(package.extras))
        for package in report.packages
    ]
    extras: list[str] = []
    for extra in report.extras:
        lacks = f"lacks {', '.join(extra.missing)}; run: {extra.command}"
        extras += [
            f"  {extra.name}: {extra.brings}",
            f"    {lacks if extra.missing else 'complete'}",
        ]
    sections = [
        [f"d2f-stream {report.d2f_stream}, Python {report.python}, {report.platform}"],
        ["backends", *_columns(trials)],
        ["packages", *_columns(packages)],
        ["extras", *extras],
    ]
    if report.problems:
        sections.append(["problems", *(f"  {problem}" for problem in report.problems)])
    return "\n\n".join("\n".join(section) for section in sections)


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages(version_of: Callable[[str], str | None]) -> tuple[Package, ...]:
    extras: dict[str, list[str]] = {}
    for requirement in _requirements():
        match = _REQUIREMENT.match(requirement)
        groups = _EXTRA.findall(requirement)
        if match is not None and (not groups or groups[0] in BRINGS):
            extras.setdefault(match[0], []).extend(groups)
    for name in RIVALS + tuple(name for name in RELATED if version_of(name)):
        extras.setdefault(name, [])
    return tuple(
        Package(name=name, version=version_of(name), extras=tuple(groups))
        for name, groups in sorted(extras.items())
    )


def _requirements() -> Iterable[str]:
    try:
        return importlib.metadata.requires("d2f-stream") or ()
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return ()


def _extra(name: str, packages: Sequence[Package]) -> Extra:
    missing = [
        package.name for package in packages if name in package.extras and not package.version
    ]
    return Extra(
        name=name, brings=BRINGS[name], missing=tuple(missing), command=_install_command(name)
    )


def _install_command(extra: str) -> str:
    return f"pip install 'd2f-stream[{extra}]'"


def _problems(version_of: Callable[[str], str | None]) -> Iterable[str]:
    if all(version_of(name) for name in RIVALS):
        yield (
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; "
            f"run: pip uninstall -y {' '.join(RIVALS)}, then install one of them"
        )
    for name in RIVALS:
        version = version_of(name)
        if version and _numbers(version) < OLDEST_ONNXRUNTIME:
            oldest = ".".join(map(str, OLDEST_ONNXRUNTIME))
            yield (
                f"{name} {version} is too old for exported models, which need {oldest} or newer; "
                f"run: pip install -U {name}"
            )
    if not version_of("d2f-stream"):
        yield "d2f-stream runs from a checkout that is not installed; run: pip install -e '.[edge]'"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)] if rows else []
    return [
        "  "
        + "  ".join(
            [*(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]]
        ).rstrip()
        for row in rows
    ]
