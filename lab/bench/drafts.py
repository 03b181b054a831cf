r"""Measures a draft adapter: one-step lengths of held-out answers, verified tokens a step.

    python -m lab.bench.drafts --base MODEL --adapter FOLDER --held-out data.npz \
        --prompts chat=chat.jsonl code=code.jsonl --grid 8:1:0 4:1:0 --output record.json

`--grid` takes block size, active blocks and confidence. Prompts go through the chat template.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from d2f_export.distill.from_ar.answers import Answers
from d2f_export.distill.from_ar.base import ArBase, open_ar_base
from d2f_export.distill.from_ar.draft_adapter import (
    MASK_EMBEDDING,
    adapter_layers,
    read_adapter,
)
from d2f_export.distill.from_ar.settings import DraftSettings
from d2f_export.distill.from_ar.training import Training
from d2f_runtime.models.checkpoints import load_checkpoint
from lab.bench.draft_decoding import Decoding, Tally, decode_verified
from lab.bench.one_step_drafts import one_step
from lab.records import command_of, write_record

__all__ = ["main"]

BATCHES: Final = 2  # of held-out answers, a block size each


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as the arguments say and write the record."""
    parser = argparse.ArgumentParser(prog="python -m lab.bench.drafts", description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, help="answers that were not learnt, .npz")
    parser.add_argument("--prompts", nargs="+", default=[], metavar="NAME=FILE")
    parser.add_argument("--prompt-field", default="prompt")
    parser.add_argument("--number", type=int, default=50, help="of prompts of each file")
    parser.add_argument("--grid", nargs="+", default=["8:1:0"], metavar="BLOCK:ACTIVE:CONFIDENCE")
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
        results["decoding"] = _decode(args, base, training)
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
        mask_id=adapter.facts.mask_id,
        device=torch.device("cuda" if is_cuda else "cpu"),
    )
    training.flat.load(adapter.factors)
    return training


def _decode(args: argparse.Namespace, base: ArBase, training: Training) -> list[dict[str, Any]]:
    prompts: list[list[int]] = []
    names: list[str] = []
    for given in args.prompts:
        name, _, path = given.partition("=")
        lines = Path(path).read_text(encoding="utf-8").splitlines()[: args.number]
        for line in lines:
            turns = [{"role": "user", "content": json.loads(line)[args.prompt_field]}]
            prompts.append(base.codec.encode(base.codec.render(turns)))
            names.append(name)
    factors = {name: value.detach() for name, value in training.flat.named.items()}
    layers = adapter_layers(factors, base.config.num_layers)

    def run(decoding: Decoding) -> Tally:
        return decode_verified(
            training.base, layers, factors[MASK_EMBEDDING], prompts, decoding,
            max_new=args.max_new, end_id=base.end_id,
        )  # fmt: skip

    alone = run(Decoding(1, 1, 0.0))  # a token a step: the base's own answers
    results = []
    for text in args.grid:
        size, active, confidence = text.split(":")
        started = time.monotonic()
        tally = run(Decoding(int(size), int(active), float(confidence)))
        same = [one == other for one, other in zip(tally.answers, alone.answers, strict=True)]
        results.append(
            {
                "block_size": int(size),
                "active": int(active),
                "confidence": float(confidence),
                "tokens_per_step": _rate(tally, names, None),
                **{name: _rate(tally, names, name) for name in dict.fromkeys(names)},
                "same_as_ar": round(sum(same) / len(same), 4),
                "seconds": round(time.monotonic() - started, 1),
            }
        )
    return results


def _rate(tally: Tally, names: Sequence[str], name: str | None) -> float:
    """Return tokens a step over the prompts of one file; None is all."""
    picked = [i for i, own in enumerate(names) if name in (None, own)]
    return round(sum(tally.tokens[i] for i in picked) / sum(tally.steps[i] for i in picked), 4)


if __name__ == "__main__":
    main()
