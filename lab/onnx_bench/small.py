"""The embedded model on a CPU: every quantization, its twin and torch, in one run.

Sizes, start, single steps and whole answers. The contenders take turns, so that a slow phase of a
shared machine hits all of them.
"""

import asyncio
import tempfile
from pathlib import Path
from typing import Any, Final

from d2f_export.onnx.artefact import Description, write_artefact
from d2f_export.onnx.quantize import Quantization
from d2f_export.onnx.verification import first_block
from d2f_runtime.models.manifest import FILE_NAME, read_manifest
from d2f_runtime.text.tokenizer import Tokenizer
from lab.bench.steps import compare_steps
from lab.bench.stream import Contender, compare, read_prompts

__all__ = ["compare_quantizations"]

QUANTIZATIONS: Final[tuple[Quantization, ...]] = ("fp32", "int8", "int4")


def compare_quantizations(
    checkpoint: Path,
    twin: Path | None,
    prompts: Path,
    *,
    number: int,
    repeats: int,
    turns: int,
    step_repeats: int,
    starts: int,
) -> dict[str, Any]:
    """Export the checkpoint in every quantization and time them. Blocks.

    Args:
        checkpoint: with a manifest, whose defaults are those of the artefacts.
        twin: an artefact of the autoregressive twin.
        prompts: JSON lines.
        number: of prompts.
        repeats: of the whole answers.
        turns: of the single steps.
        step_repeats: of a step in a turn.
        starts: of a new process; the fastest counts.
    """
    manifest = read_manifest(checkpoint)
    with tempfile.TemporaryDirectory() as name:
        folders = {f"onnx {q}": Path(name) / q for q in QUANTIZATIONS}
        for quantization, folder in zip(QUANTIZATIONS, folders.values(), strict=True):
            description = Description(name=quantization, defaults=manifest.defaults)
            write_artefact(checkpoint, folder, description, quantization=quantization)
        if twin is not None:
            folders["autoregressive twin"] = twin
        folders["torch"] = checkpoint
        lines = read_prompts(prompts, number)
        first = Tokenizer.from_folder(checkpoint).encode(lines[0]["prompt"])
        started = [
            {label: first_block(folder, "cpu", first) for label, folder in folders.items()}
            for _ in range(starts)
        ]
        contenders = [Contender(label, folder, {}) for label, folder in folders.items()]
        return {
            "bytes": {label: _size(folder) for label, folder in folders.items()},
            "startup_s": {
                label: {key: min(turn[label][key] for turn in started) for key in first_turn}
                for label, first_turn in (started or [{}])[0].items()
            },
            "steps": compare_steps(
                list(folders.values()),
                backend="auto",
                device="cpu",
                repeats=step_repeats,
                turns=turns,
            ),
            "stream": asyncio.run(compare(contenders, lines, repeats=repeats, backend="auto")),
        }


def _size(folder: Path) -> int:
    manifest = read_manifest(folder)
    files = [folder / name for name in manifest.files] + [folder / FILE_NAME]
    return sum(file.stat().st_size for file in files)
