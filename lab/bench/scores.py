r"""Measures what a draft adapter's ways of decoding score, and how fast they are, side by side.

    python -m lab.bench.scores --base MODEL --adapter FOLDER --humaneval HumanEval.jsonl \
        --gsm8k test.jsonl --prompts requests.jsonl --output record.json

Greedy answers by the torch backend, on the same kernels: the base alone, a token a step with the
first adapter at hand, and of each adapter verified and unverified blocks. What is timed has the
machine to itself; `--timed 0` leaves that out.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch

from d2f_export.distill.from_ar.base import ArBase, open_ar_base
from d2f_runtime.backends.torch_backend import TorchBackend, load
from d2f_runtime.evaluation.answers import Answer, decode_all
from d2f_stream.core.params import GenerationParams, Rank
from d2f_stream.core.presets import PRESETS
from lab.bench.graders import CodeProblem, WordProblem, grade
from lab.records import command_of, write_record

__all__ = ["main"]

ROUNDS: Final = 3  # of what is timed, the ways in turn


@dataclass(frozen=True, slots=True)
class _Task:
    """Prompts as token ids, and the problems that they are of; none where nothing is graded."""

    name: str
    prompts: list[list[int]]
    problems: list[CodeProblem | WordProblem]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as the arguments say; the record is written anew after each way."""
    parser = argparse.ArgumentParser(prog="python -m lab.bench.scores", description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", type=Path, required=True, nargs="+")
    parser.add_argument("--humaneval", type=Path, help="HumanEval.jsonl")
    parser.add_argument("--gsm8k", type=Path, help="test.jsonl of GSM8K")
    parser.add_argument("--prompts", type=Path, help="JSONL with prompts that are not graded")
    parser.add_argument("--number", type=int, default=500, help="problems of each task")
    parser.add_argument("--verified", nargs="*", default=["12"], metavar="MASKS")
    parser.add_argument(
        "--unverified", nargs="*", default=["8:1:0.9"], metavar="SIZE:BLOCKS:THRESHOLD[:RANK]"
    )
    parser.add_argument(
        "--without-base", action="store_true", help="neither the base nor token by token"
    )
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--max-new", type=int, default=384)
    parser.add_argument("--rows", type=int, default=32, help="answers decoded side by side")
    parser.add_argument("--timed", type=int, default=8, help="prompts of each task timed alone")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no way begins later")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--answers", type=Path, help="a JSONL file for all answers")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    began = time.monotonic()
    base = open_ar_base(args.base)
    tasks = _tasks(args, base)
    results: dict[str, Any] = {"ways": []}
    command = command_of("lab.bench.scores", list(argv or ()))
    device = "cpu" if args.cpu else "auto"

    def backend_of(adapter: Path | None) -> TorchBackend:
        backend = load(base.path, device=device, quantization=args.quantization, adapter=adapter)
        backend.warm_up()
        return backend

    alone = PRESETS["verified"].with_overrides(
        {"block_size": 1, "commit": "filled", "max_new_tokens": args.max_new}
    )
    ways: list[tuple[str, TorchBackend, GenerationParams]] = []
    if not args.without_base:
        ways.append(("base", backend_of(None), alone))
    for adapter in args.adapter:
        drafting = backend_of(adapter)
        if adapter == args.adapter[0] and not args.without_base:
            ways.append(("token by token", drafting, alone))
        of = f"{adapter.name}: " if len(args.adapter) > 1 else ""
        ways += [
            (f"{of}{way}", drafting, params) for way, params in _ways_of_an_adapter(args).items()
        ]
    results["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    results["quantization"] = drafting.info.quantization
    reference: dict[str, list[Answer]] = {}
    for name, backend, params in ways:
        if time.monotonic() - began > args.seconds:
            results["left_out"] = [*results.get("left_out", []), name]
            continue
        found: dict[str, Any] = {"way": name}
        for task in tasks:
            answers = decode_all(backend, task.prompts, params, rows=args.rows)
            same = None if args.without_base else reference.setdefault(task.name, answers)
            texts = [base.codec.decode(_words(answer, base)) for answer in answers]
            found[task.name] = _figures(task, answers, same, texts)
            _keep(args.answers, name, task.name, texts)
        results["ways"].append(found)
        print(json.dumps(found), flush=True)
        write_record(args.output, "scores", results, command=command)
    results["tokens_per_s_alone"] = _speeds(ways, tasks, args.timed)
    write_record(args.output, "scores", results, command=command)
    print(json.dumps(results["tokens_per_s_alone"]), flush=True)


def _tasks(args: argparse.Namespace, base: ArBase) -> list[_Task]:
    tasks: list[_Task] = []

    def encode(request: str) -> list[int]:
        return base.codec.encode(base.codec.render([{"role": "user", "content": request}]))

    def add(name: str, problems: list[Any]) -> None:
        tasks.append(_Task(name, [encode(problem.request) for problem in problems], problems))

    if args.humaneval is not None:
        add("humaneval", [
            CodeProblem(line["prompt"], line["entry_point"], line["test"])
            for line in _lines(args.humaneval, args.number)
        ])  # fmt: skip
    if args.gsm8k is not None:
        lines = _lines(args.gsm8k, args.number)
        add("gsm8k", [WordProblem.of(line["question"], line["answer"]) for line in lines])
    if args.prompts is not None:
        prompts = [encode(line["prompt"]) for line in _lines(args.prompts, args.number)]
        tasks.append(_Task("prompts", prompts, []))
    return tasks


def _lines(path: Path, number: int) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()][:number]


def _ways_of_an_adapter(args: argparse.Namespace) -> dict[str, GenerationParams]:
    verified = {
        f"verified {masks}": PRESETS["verified"].with_overrides(
            {"block_size": int(masks), "max_new_tokens": args.max_new}
        )
        for masks in args.verified
    }
    return verified | {f"unverified {text}": _unverified(text, args) for text in args.unverified}


def _unverified(text: str, args: argparse.Namespace) -> GenerationParams:
    size, blocks, threshold, *rank = text.split(":")
    params = PRESETS["paper"].with_overrides(
        {
            "block_size": int(size),
            "max_active_blocks": int(blocks),
            "confidence_threshold": float(threshold),
            "max_new_tokens": args.max_new,
            "commit": "filled",
        }
    )
    return params.with_overrides({"rank": cast(Rank, rank[0])}) if rank else params


def _words(answer: Answer, base: ArBase) -> list[int]:
    return [token for token in answer.tokens if token not in base.config.eos_ids]


def _figures(
    task: _Task, answers: Sequence[Answer], same: Sequence[Answer] | None, texts: Sequence[str]
) -> dict[str, Any]:
    tokens = sum(len(answer.tokens) for answer in answers)
    found: dict[str, Any] = {
        "answers": len(answers),
        "tokens": tokens,
        "tokens_per_step": round(tokens / sum(answer.num_steps for answer in answers), 3),
    }
    if same is not None:
        equal = sum(a.tokens == b.tokens for a, b in zip(answers, same, strict=True))
        found["same_as_base"] = round(equal / len(answers), 4)
    if task.problems:
        found["score"] = round(sum(grade(task.problems, texts)) / len(texts), 4)
    return found


def _keep(path: Path | None, way: str, task: str, texts: Sequence[str]) -> None:
    if path is None:
        return
    with path.open("a", encoding="utf-8") as file:
        for number, text in enumerate(texts):
            line = {"way": way, "task": task, "number": number, "text": text}
            file.write(json.dumps(line) + "\n")


def _speeds(
    ways: Sequence[tuple[str, TorchBackend, GenerationParams]], tasks: Sequence[_Task], timed: int
) -> dict[str, dict[str, list[float]]]:
    """Return tokens/s of answers that have the device to themselves, the ways in turn."""
    speeds: dict[str, dict[str, list[float]]] = {task.name: {} for task in tasks}
    if not timed:
        return speeds
    for _ in range(ROUNDS):
        for task in tasks:
            for name, backend, params in ways:
                began = time.perf_counter()
                answers = decode_all(backend, task.prompts[:timed], params, rows=1)
                seconds = time.perf_counter() - began
                speed = sum(len(answer.tokens) for answer in answers) / seconds
                speeds[task.name].setdefault(name, []).append(round(speed, 1))
    return speeds


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
