r"""Measures a draft adapter: one-step lengths of held-out answers, verified tokens a step.

    python -m lab.bench.drafts --base MODEL --adapter FOLDER --held-out data.npz \
        --prompts chat=chat.jsonl code=code.jsonl --grid 8:512:yes 4:10:no --output record.json

`--grid` takes masks of a draft, spare rows of a step (see ModelInfo) and whether it may branch.
Prompts go through the chat template; the torch backend decodes as it does for users.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from d2f_export.distill.from_ar.answers import Answers
from d2f_export.distill.from_ar.base import ArBase, open_ar_base
from d2f_export.distill.from_ar.draft_adapter import read_adapter
from d2f_export.distill.from_ar.settings import DraftSettings
from d2f_export.distill.from_ar.training import Training
from d2f_runtime.backends.torch_backend import load
from d2f_runtime.evaluation.answers import Answer, decode_all
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_stream.core.presets import PRESETS
from lab.bench.one_step_drafts import one_step
from lab.records import command_of, write_record

__all__ = ["main"]

BATCHES: Final = 2  # of held-out answers, a block size each
REPEATS: Final = 3  # of what is timed


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as the arguments say and write the record."""
    parser = argparse.ArgumentParser(prog="python -m lab.bench.drafts", description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, help="answers that were not learnt, .npz")
    parser.add_argument("--prompts", nargs="+", default=[], metavar="NAME=FILE")
    parser.add_argument("--prompt-field", default="prompt")
    parser.add_argument("--number", type=int, default=50, help="of prompts of each file")
    parser.add_argument("--grid", nargs="+", default=["8:512:yes"], metavar="MASKS:ROWS:BRANCH")
    parser.add_argument("--timed", type=int, default=8, help="prompts that are decoded alone")
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--max-new", type=int, default=192)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    base = open_ar_base(args.base)
    training = _training(args, base)
    results: dict[str, Any] = {"device": str(training.device)}
    if args.held_out is not None:
        answers = Answers.read(args.held_out)
        results["one_step"] = [
            one_step(training, answers, size, BATCHES).to_dict()
            for size in training.settings.block_sizes
        ]
    if args.prompts:
        results["decoding"] = _decode(args, base)
    given = [] if argv is None else list(argv)
    command = command_of("lab.bench.drafts", given)
    write_record(args.output, "draft-adapter", results, command=command)
    print(json.dumps(results, indent=1))


def _training(args: argparse.Namespace, base: ArBase) -> Training:
    """Return a training that stands where the adapter was written."""
    adapter = read_adapter(args.adapter, base.config)
    settings = DraftSettings(
        from_ar=args.base,
        data=(str(args.held_out),),
        rank=adapter.rank,
        rows=args.rows,
        block_sizes=adapter.facts.block_sizes,
    )
    is_cuda = torch.cuda.is_available() and not args.cpu
    training = Training(
        settings,
        load_checkpoint(base.path, device="cpu", dtype=torch.float32),
        mask_id=adapter.mask_id,
        device=torch.device("cuda" if is_cuda else "cpu"),
    )
    training.flat.load(adapter.factors)
    return training


def _decode(args: argparse.Namespace, base: ArBase) -> list[dict[str, Any]]:
    backend = load(
        base.path,
        device="cpu" if args.cpu else "auto",
        quantization=args.quantization,
        adapter=args.adapter,
    )
    backend.warm_up()
    info = backend.info
    prompts: list[list[int]] = []
    names: list[str] = []
    for given in args.prompts:
        name, _, path = given.partition("=")
        lines = Path(path).read_text(encoding="utf-8").splitlines()[: args.number]
        for line in lines:
            turns = [{"role": "user", "content": json.loads(line)[args.prompt_field]}]
            prompts.append(base.codec.encode(base.codec.render(turns)))
            names.append(name)

    def run(text: str, chosen: Sequence[Sequence[int]], rows: int) -> list[Answer]:
        size, spare, branches = text.split(":")
        backend.info = replace(info, spare_rows=int(spare), branches=branches == "yes")
        params = msgspec.structs.replace(
            PRESETS["verified"], block_size=int(size), max_new_tokens=args.max_new
        )
        return decode_all(backend, chosen, params, rows=rows)

    alone = run("1:1:no", prompts, args.rows)  # a token a step: the base's own answers
    results = []
    for text in ["1:1:no", *args.grid]:
        found = run(text, prompts, args.rows)
        same = [one.tokens == other.tokens for one, other in zip(found, alone, strict=True)]
        speeds = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            timed = run(text, prompts[: args.timed], 1)
            seconds = time.perf_counter() - started
            speeds.append(sum(len(answer.tokens) for answer in timed) / seconds)
        results.append(
            {
                "drafts": text,
                "tokens_per_step": _rate(found, names, None),
                **{name: _rate(found, names, name) for name in dict.fromkeys(names)},
                "same_as_ar": round(sum(same) / len(same), 4),
                "tokens_per_s_alone": [round(speed, 1) for speed in speeds],
            }
        )
    return results


def _rate(answers: Sequence[Answer], names: Sequence[str], name: str | None) -> float:
    """Return tokens a step over the prompts of one file; None is all."""
    picked = [answer for answer, own in zip(answers, names, strict=True) if name in (None, own)]
    steps = sum(answer.num_steps for answer in picked)
    return round(sum(len(answer.tokens) for answer in picked) / steps, 4)


if __name__ == "__main__":
    main()
