"""Command line of the offline work: python -m d2f_export COMMAND.

The embedded model is made by these, in order: tokenizer, twin, teacher, student, export.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from d2f_stream.params import GenerationParams

if TYPE_CHECKING:
    from d2f_export.evaluate import Report

FIXED_SEED = 1


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

    score = commands.add_parser("evaluate", help="score a checkpoint on held-out problems")
    score.add_argument("checkpoint", type=Path)
    score.add_argument("--tokenizer", type=Path, required=True)
    score.add_argument("--problems", type=int, default=1000)
    score.add_argument("--device", default="auto")
    score.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    score.add_argument("--vanilla", action="store_true", help="full attention, one token a step")
    score.add_argument("--output", type=Path, help="append the figures to this JSON-lines file")
    score.add_argument("--label", default="")
    score.add_argument(
        "--setting",
        action="append",
        metavar="JSON",
        help="generation parameters; repeat for several runs",
    )
    score.set_defaults(run=_evaluate)

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
    from d2f_export.embedded import RECIPES
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
    model, objective = _stage(arguments, recipe, device)
    seed = arguments.seed * 10 + ["twin", "teacher", "student"].index(arguments.stage)
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
    import torch

    from d2f_export.evaluate import TokenizerCodec, evaluate, held_out, report
    from d2f_export.vanilla import decode_vanilla
    from d2f_runtime.backends.torch_backend import TorchBackend
    from d2f_runtime.models.checkpoints import load_checkpoint

    model = load_checkpoint(arguments.checkpoint)
    device = _device(arguments.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    codec = TokenizerCodec(arguments.tokenizer)
    sample = held_out(arguments.problems)
    name = arguments.label or arguments.checkpoint.name
    if arguments.vanilla:
        model.to(device=device, dtype=dtype).eval()
        prompts = [codec.encode(problem.question) for problem in sample]
        answers = decode_vanilla(model, prompts, max_new_tokens=160, block_size=16)
        setting = {"vanilla": True, "block_size": 16}
        _record(report(name, setting, sample, answers, codec), arguments.output)
    backend = TorchBackend(model, name=name, device=device, dtype=dtype, max_tokens=150_000)
    for text in arguments.setting or []:
        params = GenerationParams(**json.loads(text))
        _record(evaluate(name, backend, codec, sample, params), arguments.output)


def _record(result: "Report", output: Path | None) -> None:
    print(result.line(), flush=True)
    if output is not None:
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result.to_dict()) + "\n")


def _plot(arguments: argparse.Namespace) -> None:
    from d2f_export.plot import plot_trade_off

    plot_trade_off(arguments.records, arguments.output)
    print(f"wrote {arguments.output}")


def _stage(arguments: argparse.Namespace, recipe: object, device: str):  # type: ignore[no-untyped-def]
    from d2f_export.embedded import Recipe
    from d2f_export.stages import Objective, StudentObjective, TeacherObjective, TwinObjective
    from d2f_runtime.models.checkpoints import load_checkpoint
    from d2f_runtime.models.transformer import Transformer

    assert isinstance(recipe, Recipe)
    config = recipe.twin_config if arguments.stage == "twin" else recipe.config
    model = Transformer(config)
    if arguments.start:
        model.load_state_dict(load_checkpoint(arguments.start).state_dict())
    else:
        model.init_weights(arguments.seed)
    objective: Objective
    if arguments.stage == "twin":
        objective = TwinObjective()
    elif arguments.stage == "teacher":
        objective = TeacherObjective(recipe.noise)
    else:
        teacher = load_checkpoint(arguments.teacher or arguments.start).to(device).eval()
        weight = recipe.data_weight if arguments.data_weight is None else arguments.data_weight
        objective = StudentObjective(teacher.requires_grad_(False), recipe.noise, weight)
    return model, objective


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
