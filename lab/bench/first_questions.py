r"""Measures a chat model's own drafts on a CPU: as it ships, token by token, llama.cpp, in turn.

    python -m lab.bench.first_questions --model models/smollm2-135m-d2f/smollm2_135m_d2f/model \
        --output bench/smollm2-135m-d2f-cpu.json

Greedy answers to the questions, one at a time, prompts included, by the decoder without the engine.
`--llama` names an interpreter with llama-cpp-python and a GGUF file to compare with. CPU time is
told beside tokens/s; where other work runs, compare it on one processor (`taskset -c 0`).
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from d2f_runtime.backends.onnx_backend import load
from d2f_runtime.cpus import num_cpus
from d2f_runtime.evaluation.answers import Answer, decode_all
from d2f_runtime.models.manifest import read_manifest
from d2f_runtime.text.tokenizer import Tokenizer
from lab.bench.llama_cpp_answers import LlamaCppAnswers
from lab.records import command_of, spread, write_record

__all__ = ["main"]

QUESTIONS: Final = (
    "Who are you?",
    "What is the capital of France?",
    "Write a Python function that reverses a list.",
    "Why is the sky blue?",
    "Write an email to my boss about a day off.",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as the arguments say and write the record."""
    parser = argparse.ArgumentParser(prog="python -m lab.bench.first_questions")
    parser.add_argument(
        "--model", type=Path, required=True, help="an ONNX folder whose model drafts"
    )
    parser.add_argument("--max-new", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--llama", type=Path, nargs=2, metavar=("PYTHON", "GGUF"))
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    manifest = read_manifest(args.model)
    codec = Tokenizer.from_folder(args.model, mask_id=manifest.mask_id)
    turns = ([{"role": "user", "content": question}] for question in QUESTIONS)
    prompts = [codec.encode(codec.render(turn)) for turn in turns]
    backend = load(args.model, device="cpu")
    shipped = manifest.params_for("cpu").with_overrides({"max_new_tokens": args.max_new})
    alone = shipped.with_overrides({"block_size": 1, "commit": "filled"})
    ways = {"shipped": shipped, "token by token": alone}
    found: dict[str, list[Answer]] = {}
    timed: dict[str, list[tuple[int, float, float]]] = {}
    llama = LlamaCppAnswers(args.llama[0], args.llama[1], num_cpus()) if args.llama else None
    for _ in range(args.repeats):
        for way, params in ways.items():
            began, cpu_began = time.perf_counter(), time.process_time()
            found[way] = decode_all(backend, prompts, params, rows=1)
            times = time.perf_counter() - began, time.process_time() - cpu_began
            number = sum(len(answer.tokens) for answer in found[way])
            timed.setdefault(way, []).append((number, *times))
        if llama is not None:
            answered = llama.answer(prompts, args.max_new, manifest.eos_ids)
            timed.setdefault("llama.cpp", []).append(answered)
    if llama is not None:
        llama.close()
    results: dict[str, Any] = {way: _speeds(runs) for way, runs in timed.items()}
    for way, answers in found.items():
        results[way]["steps"] = sum(answer.num_steps for answer in answers)
    pairs = zip(*found.values(), strict=True)
    results["same_answers"] = sum(one.tokens == other.tokens for one, other in pairs)
    command = command_of("lab.bench.first_questions", list(argv or ()))
    write_record(args.output, "first-questions", results, command=command)
    print(results)


def _speeds(runs: Sequence[tuple[int, float, float]]) -> dict[str, Any]:
    """Return what runs of so many tokens, seconds and CPU seconds tell."""
    return {
        "tokens_per_s": spread([number / seconds for number, seconds, _ in runs]),
        "cpu_ms_per_token": spread([1e3 * cpu / number for number, _, cpu in runs]),
        "tokens": runs[-1][0],
    }


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
