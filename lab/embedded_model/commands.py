"""What the commands of lab.embedded_model do; their arguments are declared in __main__.py.

Each imports what it needs itself, so that a command starts without the others' libraries.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from d2f_stream.core.params import GenerationParams

if TYPE_CHECKING:
    from lab.embedded_model.evaluate import Report

__all__ = [
    "run_evaluate",
    "run_manifest",
    "run_problems",
    "run_tokenizer",
    "run_train",
]


def run_tokenizer(arguments: argparse.Namespace) -> None:
    """Train the tokenizer."""
    from lab.embedded_model.tokenizer_training import train_tokenizer

    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    train_tokenizer(seed=arguments.seed).save(str(arguments.output))
    print(f"wrote {arguments.output}")


def run_problems(arguments: argparse.Namespace) -> None:
    """Write held-out problems as JSON lines."""
    from lab.embedded_model.evaluate import held_out

    with arguments.output.open("w", encoding="utf-8") as file:
        for problem in held_out(arguments.number):
            entry = {
                "prompt": problem.question,
                "ending": f"The answer is {problem.result}.",
                "answer": problem.answer,
            }
            file.write(json.dumps(entry) + "\n")
    print(f"wrote {arguments.output}")


def run_train(arguments: argparse.Namespace) -> None:
    """Run one of the three trainings."""
    import msgspec
    from rich.console import Console

    from lab.embedded_model.recipe import RECIPES
    from lab.embedded_model.stages import train_stage

    names = ("steps", "lr", "max_seconds", "seed", "start", "teacher")
    given = {name: getattr(arguments, name, None) for name in names}
    settings = msgspec.structs.replace(
        getattr(RECIPES[arguments.recipe], arguments.stage),
        tokenizer=str(arguments.tokenizer),
        **{name: value for name, value in given.items() if value is not None},
    )
    train_stage(
        settings,
        arguments.output,
        num_workers=arguments.workers,
        cpu=arguments.cpu,
        compile_layers=arguments.compile,
        console=Console(),
    )


def run_evaluate(arguments: argparse.Namespace) -> None:
    """Score a model folder and record the figures."""
    from rich.console import Console
    from rich.progress import Progress

    from d2f_runtime.backends import choose_backend, open_backend
    from d2f_runtime.models.manifest import FILE_NAME, read_manifest, verify_files
    from d2f_runtime.text.tokenizer import Tokenizer
    from lab.embedded_model.evaluate import evaluate, held_out

    folder: Path = arguments.model
    name = arguments.label or folder.name
    codec = Tokenizer(arguments.tokenizer or folder / "tokenizer.json")
    sample = held_out(arguments.problems)
    backend = open_backend(
        choose_backend(folder, arguments.backend, device=arguments.device),
        folder,
        device=arguments.device,
        quantization=arguments.quantization,
    )
    defaults = GenerationParams(block_size=backend.info.native_block_size)
    if (folder / FILE_NAME).exists():
        manifest = read_manifest(folder)
        verify_files(folder, manifest)
        defaults = manifest.params_for(backend.info.device)
    for text in arguments.setting or ["{}"]:
        params = defaults.with_overrides(json.loads(text))
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("decoding", total=len(sample))
            on_answer = partial(bar.advance, task)
            result = evaluate(name, backend, codec, sample, params, on_answer=on_answer)
        _record(result, arguments.output)


def _record(result: "Report", output: Path | None) -> None:
    print(result.line(), flush=True)
    if output is not None:
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result.to_dict()) + "\n")


def run_manifest(arguments: argparse.Namespace) -> None:
    """Write the manifest of a checkpoint folder."""
    from d2f_export.onnx.artefact import Description
    from d2f_runtime.models.facts import About
    from d2f_runtime.models.manifest import TrainingInfo
    from lab.embedded_model.checkpoint_manifest import write_checkpoint_manifest

    description = Description(
        name=arguments.name,
        defaults=arguments.defaults,
        training=TrainingInfo(command=arguments.training, figures=arguments.figures),
        about=About(description=arguments.description),
    )
    write_checkpoint_manifest(arguments.checkpoint, description)
    print(f"wrote {arguments.checkpoint / 'manifest.json'}")
