"""The command `d2f-stream models`: what is known, what is here, what fits, and getting it.

Owns arguments and tables; names and sizes are the catalogue's, files the shelf's.
"""

import argparse
import contextlib
from collections.abc import Iterable, Mapping, Sequence

from d2f_runtime.models.catalogue import BITS, CATALOGUE, ON_GPU, Entry
from d2f_runtime.models.installed import EMBEDDED, find_installed, installed_names
from d2f_runtime.models.manifest import Manifest, read_manifest
from d2f_runtime.models.measured import peak
from d2f_runtime.models.names import find, suggest
from d2f_runtime.models.shelf import Kept, kept, pull, remove
from d2f_stream.core.errors import ModelError, ModelNotFound
from d2f_stream.parser import Parser, add_command
from d2f_stream.terminal.machine import GIB, Machine
from d2f_stream.terminal.served import served
from d2f_stream.terminal.table import table, width_here, wrapped

__all__ = ["add_arguments", "installed", "run"]


def add_arguments(parser: Parser) -> None:
    """Declare the subcommands."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, text: str, of: str = "") -> Parser:
        example = f"d2f-stream models {name} {of}".rstrip()
        return add_command(commands, name, text, example=example)

    listing = add("list", "the known models, those on this machine, and what a server serves")
    listing.add_argument(
        "--server", metavar="URL", help="which one (default: that of the config file, if any)"
    )
    listing.add_argument("--token", metavar="TOKEN", help="of that server; better in D2F_TOKEN")
    show = add("show", "one model: where it comes from, what it needs", "sdar:4b")
    show.add_argument("name", metavar="NAME", help="a short name or a hub id")
    fetch = add(
        "pull",
        "fetch a model, and its adapter; what is here already is not fetched again",
        "d2f-llada:8b",
    )
    fetch.add_argument("name", metavar="NAME", help="a short name or a hub id")
    drop = add("rm", "delete a model from the hub's cache", "sdar:4b")
    drop.add_argument("name", metavar="NAME", help="a short name or a hub id")
    add("recommend", "which models fit this machine, and how")


def run(arguments: argparse.Namespace) -> str:
    """Run one subcommand; return what it says.

    Raises:
        ModelNotFound: there is no such model.
        MissingExtra: huggingface_hub is not installed.
    """
    match arguments.action:
        case "list":
            known = listed(CATALOGUE, kept(), installed())
            if arguments.server is None:
                return known
            told = served(arguments.server, arguments.token)
            return f"{known}\n\n{wrapped(told, width=width_here())}"
        case "show":
            manifest = installed().get(arguments.name)
            if manifest is not None:
                return described(arguments.name, manifest)
            return shown(_entry(arguments.name), {item.repo for item in kept()}, Machine.this())
        case "pull":
            return _pull(arguments.name)
        case "rm":
            return _remove(arguments.name)
        case _:
            return recommended(CATALOGUE, Machine.this())


def listed(entries: Iterable[Entry], here: Sequence[Kept], local: Mapping[str, Manifest]) -> str:
    """Return the table of installed models, of known ones and of others in the cache."""
    sizes = {item.repo: item.size for item in here}
    rows = [("name", "parameters", "on disk", "licence", "repository")]
    rows += [
        (name, "-", _size(manifest), manifest.license or "-", "installed")
        for name, manifest in local.items()
    ]
    known: set[str] = set()
    for entry in entries:
        known |= {entry.repo, entry.adapter or entry.repo}
        at = sizes.get(entry.repo)
        size = f"{at / 1e9:.1f} GB" if at is not None else "-"
        rows.append((entry.name, f"{entry.parameters:.3g} B", size, entry.licence, entry.repo))
    rows += [
        ("-", "-", f"{item.size / 1e9:.1f} GB", "-", item.repo)
        for item in here
        if item.repo not in known
    ]
    return table(rows, width=width_here())


def installed() -> dict[str, Manifest]:
    """Return the models that run without being fetched, by name; broken ones are left out."""
    from d2f_runtime.models.installed import embedded_folder  # not at each start

    found: dict[str, Manifest] = {}
    for name in installed_names():
        with contextlib.suppress(ModelError):
            if (folder := find_installed(name)) is not None:
                found[name] = read_manifest(folder)
    with contextlib.suppress(ModelError):
        found[EMBEDDED] = read_manifest(embedded_folder())
    return found


def described(name: str, manifest: Manifest) -> str:
    """Return what an installed model tells of itself, a line each."""
    return table(
        width=width_here(),
        rows=[
            ("name", f"{name} (installed)"),
            ("family", manifest.family),
            ("licence", manifest.license or "-"),
            ("on disk", _size(manifest)),
            ("context", f"{manifest.max_len:,} tokens"),
            ("what for", manifest.description or "-"),
        ],
    )


def shown(entry: Entry, here: set[str], machine: Machine) -> str:
    """Return what is known of one model, a line each."""
    facts = [
        ("name", entry.name),
        ("repository", entry.repo + (" (on this machine)" if entry.repo in here else "")),
        ("family", entry.family),
        ("licence", entry.licence),
        ("parameters", f"{entry.parameters:.3g} billion"),
        ("download", f"{entry.download():.1f} GB"),
    ]
    if entry.adapter is not None:
        facts.append(("adapter", entry.adapter))
    if entry.preset is not None:
        facts.append(("preset", entry.preset))
    facts += [(f"memory, {name}", _told(entry, name, machine)) for name in BITS]
    here_is = f"With 4,096 tokens of context; here: {machine.told}."
    return f"{table(facts, width=width_here())}\n\n{wrapped(here_is, width=width_here())}"


def recommended(entries: Iterable[Entry], machine: Machine) -> str:
    """Return what each model needs in each quantisation, which to take, and what was measured."""
    names = machine.quantizations
    rows, measured = [("name", *names, "take")], []
    for entry in sorted(entries, key=lambda entry: -entry.parameters):
        needed = {name: entry.memory(name) for name in names}
        fitting = [name for name in names if needed[name] <= machine.room]
        cells = [_gib(needed[name], fits=name in fitting) for name in names]
        rows.append((entry.name, *cells, fitting[0] if fitting else "-"))
        peaks = [found for name in ON_GPU if (found := peak(entry.name, name)) is not None]
        measured += [
            f"  {entry.name} {found.quantization}: {found.gb * 1e9 / GIB:.1f} on {found.device}"
            for found in peaks
        ]
    told = [
        "GiB with 4,096 tokens of context, computed from the models' sizes.",
        f"In brackets: more than {machine.told}.",
        "Measured, with a short context (GiB at most):",
    ]
    below = wrapped("\n".join([*told, *measured]), width=width_here(), indent="    ")
    return f"{table(rows, width=width_here())}\n\n{below}"


def _pull(name: str) -> str:
    if name in installed():
        return f"{name} is installed: there is nothing to fetch"
    entry = find(name)
    if entry is None and "/" not in name:
        raise ModelNotFound(f"nothing is known of {name}; {suggest(name)}")
    repos = [name] if entry is None else [entry.repo] + ([entry.adapter] if entry.adapter else [])
    return "\n".join(f"{repo}: {pull(repo)}" for repo in repos)


def _remove(name: str) -> str:
    entry = find(name)
    repo = name if entry is None else entry.repo
    others = [e.name for e in CATALOGUE if e.repo == repo and e.name != (entry and entry.name)]
    told = f"; {', '.join(others)} used the same files" if others else ""
    return f"removed {repo}: {remove(repo) / 1e9:.1f} GB are free again{told}"


def _size(manifest: Manifest) -> str:
    return f"{sum(file.bytes for file in manifest.files.values()) / 1e9:.2f} GB"


def _entry(name: str) -> Entry:
    entry = find(name)
    if entry is None:
        raise ModelNotFound(f"nothing is known of {name}; {suggest(name)}")
    return entry


def _gib(needed: int, *, fits: bool) -> str:
    return f"{needed / GIB:.1f}" if fits else f"({needed / GIB:.1f})"


def _told(entry: Entry, quantization: str, machine: Machine) -> str:
    needed, found = entry.memory(quantization), peak(entry.name, quantization)
    if quantization not in machine.quantizations:
        verdict = "not on a GPU" if machine.has_gpu else "needs a GPU"
    else:
        verdict = "fits" if needed <= machine.room else "does not fit"
    told = f"{needed / GIB:5.1f} GiB computed: {verdict}"
    if found is not None:
        told += f"; {found.gb * 1e9 / GIB:.1f} measured on {found.device}, {found.record}"
    return told
