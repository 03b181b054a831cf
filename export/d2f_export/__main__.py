"""Command line of the offline work: python -m d2f_export COMMAND.

The embedded model is made by these, in order: tokenizer, twin, teacher, student, export.
"""

import argparse
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from d2f_stream.params import GenerationParams

if TYPE_CHECKING:
    from d2f_export.evaluate import Report
    from d2f_export.problems import Problem
    from d2f_runtime.tokenizer import TextCodec

FIXED_SEED = 1
LAST_MESSAGE = "{{ messages[-1]['content'] | trim }}"  # a problem is answered by itself


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    parser = argparse.ArgumentParser(prog="python -m d2f_export", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    tokenizer = commands.add_parser("tokenizer", help="train the tokenizer on generated problems")
    tokenizer.add_argument("--output", type=Path, required=True, help="the tokenizer.json to write")
    tokenizer.add_argument("--seed", type=int, default=FIXED_SEED)
    tokenizer.set_defaults(run=_tokenizer)

    listing = commands.add_parser("problems", help="write held-out problems as JSON lines")
    listing.add_argument("--output", type=Path, required=True)
    listing.add_argument("--number", type=int, default=64)
    listing.set_defaults(run=_problems)

    for name, start in (("twin", None), ("teacher", "twin"), ("student", "teacher")):
        command = commands.add_parser(name, help=f"train the {name}")
        _add_training_arguments(command, start)
        command.set_defaults(run=_train, stage=name)

    score = commands.add_parser("evaluate", help="score a model folder on held-out problems")
    score.add_argument("model", type=Path, help="a checkpoint or an exported artefact")
    score.add_argument("--tokenizer", type=Path, help="where the folder has none")
    score.add_argument("--problems", type=int, default=1000)
    score.add_argument("--backend", choices=["auto", "onnx", "torch"], default="auto")
    score.add_argument("--device", default="auto")
    score.add_argument("--quantization", default="auto")
    score.add_argument("--vanilla", action="store_true", help="full attention, one token a step")
    score.add_argument("--output", type=Path, help="append the figures to this JSON-lines file")
    score.add_argument("--label", help="instead of the folder's name")
    score.add_argument(
        "--setting",
        action="append",
        metavar="JSON",
        help="generation parameters on top of the model's own; repeat for several runs",
    )
    score.set_defaults(run=_evaluate)

    export = commands.add_parser("export", help="write an ONNX model folder from a checkpoint")
    export.add_argument("checkpoint", type=Path)
    export.add_argument("--output", type=Path, required=True, help="the folder; replaced whole")
    export.add_argument("--name", required=True, help="the model's, for people")
    export.add_argument("--tokenizer", type=Path, help="where the checkpoint folder has none")
    export.add_argument("--quantization", choices=["int8", "fp32"], default="int8")
    export.set_defaults(run=_export)

    seal = commands.add_parser("manifest", help="write the manifest of a checkpoint folder")
    seal.add_argument("checkpoint", type=Path)
    seal.add_argument("--name", required=True)
    for command in (export, seal):
        command.add_argument(
            "--defaults", type=json.loads, default={}, metavar="JSON", help="by kind of device"
        )
        command.add_argument("--training", default="", help="what made the checkpoint")
        command.add_argument(
            "--figures", type=json.loads, default={}, metavar="JSON", help="what was measured"
        )
    seal.set_defaults(run=_manifest)

    verify = commands.add_parser("verify", help="compare an artefact with its checkpoint")
    verify.add_argument("artefact", type=Path)
    verify.add_argument("--checkpoint", type=Path, required=True)
    verify.add_argument("--problems", type=int, default=50)
    verify.add_argument("--output", type=Path, help="write the comparison to this JSON file")
    verify.set_defaults(run=_verify)

    plot = commands.add_parser("plot", help="draw accuracy against tokens per step")
    plot.add_argument("records", type=Path, nargs="+", help="files written by evaluate --output")
    plot.add_argument("--output", type=Path, required=True)
    plot.set_defaults(run=_plot)

    arguments = parser.parse_args(argv)
    arguments.run(arguments)


def _add_training_arguments(command: argparse.ArgumentParser, start: str | None) -> None:
    command.add_argument("--recipe", choices=["embedded", "tiny"], default="embedded")
    command.add_argument("--tokenizer", type=Path, required=True)
    command.add_argument("--output", type=Path, required=True, help="the run's folder; resumes")
    command.add_argument("--steps", type=int, help="instead of the recipe's")
    command.add_argument("--lr", type=float, help="instead of the recipe's")
    command.add_argument("--max-seconds", type=float, help="shorten the schedule to this time")
    command.add_argument("--seed", type=int, default=FIXED_SEED)
    command.add_argument("--device", default="auto")
    command.add_argument("--workers", type=int, default=0, help="processes that write problems")
    command.add_argument("--compile", action="store_true", help="compile the layers (GPU)")
    command.add_argument(
        "--start", type=Path, help=f"checkpoint to start from ({start or 'default: fresh'})"
    )
    if start == "teacher":
        command.add_argument("--teacher", type=Path, help="the frozen teacher, default --start")
        command.add_argument("--data-weight", type=float, help="instead of the recipe's")


def _tokenizer(arguments: argparse.Namespace) -> None:
    from d2f_export.tokenizer_training import train_tokenizer

    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    train_tokenizer(seed=arguments.seed).save(str(arguments.output))
    print(f"wrote {arguments.output}")


def _problems(arguments: argparse.Namespace) -> None:
    from d2f_export.evaluate import held_out

    with arguments.output.open("w", encoding="utf-8") as file:
        for problem in held_out(arguments.number):
            entry = {
                "prompt": problem.question,
                "ending": f"The answer is {problem.result}.",
                "answer": problem.answer,
            }
            file.write(json.dumps(entry) + "\n")
    print(f"wrote {arguments.output}")


def _train(arguments: argparse.Namespace) -> None:
    from d2f_export.corpus import Corpus
    from d2f_export.embedded import RECIPES, STAGES, prepare
    from d2f_export.training import train

    recipe = RECIPES[arguments.recipe]
    device = _device(arguments.device)
    settings = replace(
        getattr(recipe, arguments.stage), max_seconds=arguments.max_seconds, seed=arguments.seed
    )
    if arguments.steps:
        settings = replace(settings, steps=arguments.steps)
    if arguments.lr:
        settings = replace(settings, lr=arguments.lr)
    model, objective = prepare(
        arguments.stage,
        recipe,
        start=arguments.start,
        teacher=getattr(arguments, "teacher", None),
        data_weight=getattr(arguments, "data_weight", None),
        seed=arguments.seed,
        device=device,
    )
    seed = arguments.seed * 10 + STAGES.index(arguments.stage)
    corpus = Corpus(arguments.tokenizer, seed, num_workers=arguments.workers)
    train(
        model,
        objective,
        corpus,
        arguments.output,
        settings,
        device=device,
        compile_layers=arguments.compile,
    )
    print(f"wrote {arguments.output}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from d2f_export.evaluate import evaluate, held_out
    from d2f_runtime.backends import choose_backend, open_backend
    from d2f_runtime.manifest import FILE_NAME, read_manifest, verify_files
    from d2f_runtime.tokenizer import Tokenizer

    folder: Path = arguments.model
    name = arguments.label or folder.name
    codec = Tokenizer(arguments.tokenizer or folder / "tokenizer.json")
    sample = held_out(arguments.problems)
    if arguments.vanilla:
        _record(_vanilla(name, arguments, sample, codec), arguments.output)
        return
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


def _vanilla(
    name: str, arguments: argparse.Namespace, sample: "list[Problem]", codec: "TextCodec"
) -> "Report":
    import torch

    from d2f_export.evaluate import report
    from d2f_export.vanilla import decode_vanilla
    from d2f_runtime.models.checkpoints import load_checkpoint

    dtype = {"bf16": torch.bfloat16}.get(arguments.quantization, torch.float32)
    model = load_checkpoint(arguments.model).to(device=_device(arguments.device), dtype=dtype)
    prompts = [codec.encode(problem.question) for problem in sample]
    answers = decode_vanilla(model.eval(), prompts, max_new_tokens=160, block_size=16)
    return report(name, {"vanilla": True, "block_size": 16}, sample, answers, codec)


def _record(result: "Report", output: Path | None) -> None:
    print(result.line(), flush=True)
    if output is not None:
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result.to_dict()) + "\n")


def _export(arguments: argparse.Namespace) -> None:
    from d2f_export.artefact import write_artefact
    from d2f_runtime.manifest import TrainingInfo

    write_artefact(
        arguments.checkpoint,
        arguments.output,
        name=arguments.name,
        tokenizer_path=arguments.tokenizer or arguments.checkpoint / "tokenizer.json",
        quantization=arguments.quantization,
        chat_template=LAST_MESSAGE,
        defaults=arguments.defaults,
        training=TrainingInfo(command=arguments.training, figures=arguments.figures),
    )
    print(f"wrote {arguments.output}")


def _verify(arguments: argparse.Namespace) -> None:
    from d2f_export.evaluate import held_out
    from d2f_export.verify import compare_backends
    from d2f_runtime.backends import open_backend
    from d2f_runtime.manifest import read_manifest, verify_files
    from d2f_runtime.tokenizer import Tokenizer

    manifest = read_manifest(arguments.artefact)
    verify_files(arguments.artefact, manifest)
    codec = Tokenizer.from_folder(arguments.artefact)
    comparison = compare_backends(
        open_backend("torch", arguments.checkpoint, device="cpu", quantization="fp32"),
        open_backend("onnx", arguments.artefact, device="cpu", quantization="auto"),
        [codec.encode(problem.question) for problem in held_out(arguments.problems)],
        manifest.params_for("cpu"),
    )
    text = json.dumps(asdict(comparison), indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


def _manifest(arguments: argparse.Namespace) -> None:
    from d2f_export.artefact import write_checkpoint_manifest
    from d2f_runtime.manifest import TrainingInfo

    write_checkpoint_manifest(
        arguments.checkpoint,
        name=arguments.name,
        defaults=arguments.defaults,
        training=TrainingInfo(command=arguments.training, figures=arguments.figures),
    )
    print(f"wrote {arguments.checkpoint / 'manifest.json'}")


def _plot(arguments: argparse.Namespace) -> None:
    from d2f_export.plot import plot_trade_off

    plot_trade_off(arguments.records, arguments.output)
    print(f"wrote {arguments.output}")


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
