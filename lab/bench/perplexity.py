r"""Measures how well a converted model predicts answers: its perplexity, beside its base's in fp32.

    python -m lab.bench.perplexity --model models/smollm2-135m-d2f/smollm2_135m_d2f/model \
        --data held_out.npz --examples 40 --base SmolLM2-135M-Instruct.Q4_1.gguf --output OUT.json

`--data` is a file that `d2f-stream distill-data` wrote, of answers that no training saw. Each is
predicted token by token from what is before it, as verified decoding does, in one step.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from d2f_export.distill.from_ar.answers import Answers
from d2f_runtime.backends.base import StepRow
from d2f_runtime.backends.onnx_backend import load
from d2f_runtime.decoding.window import Window
from lab.records import command_of, write_record

__all__ = ["main", "perplexity"]

Logits = npt.NDArray[np.float32]
Predict = Callable[[list[int], int], Logits]
"""Returns [A, V] logits of the A tokens from a place in the tokens on."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as the arguments say and write the record."""
    parser = argparse.ArgumentParser(prog="python -m lab.bench.perplexity")
    parser.add_argument(
        "--model", type=Path, required=True, help="an ONNX folder of a converted model"
    )
    parser.add_argument("--data", type=Path, required=True, help="answers, of distill-data")
    parser.add_argument("--examples", type=int, default=40, help="how many of them, from the first")
    parser.add_argument("--base", type=Path, help="a checkpoint to compare with, in fp32")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    answers = Answers.read(args.data)
    answers = answers.select(np.arange(min(args.examples, len(answers))))
    results = {"model": perplexity(_of_artefact(args.model), answers)}
    if args.base is not None:
        results["base"] = perplexity(_of_checkpoint(args.base), answers)
    command = command_of("lab.bench.perplexity", list(argv or ()))
    write_record(args.output, "perplexity", results, command=command)
    print(results)


def perplexity(predict: Predict, answers: Answers) -> dict[str, Any]:
    """Return the perplexity of the answers' tokens, and how many are the likeliest."""
    lost = 0.0
    likeliest = number = 0
    for start, length, begin in zip(answers.starts, answers.lengths, answers.prompts, strict=True):
        tokens = [int(token) for token in answers.tokens[start : start + length]]
        logits = predict(tokens, int(begin)).astype(np.float64)
        asked = np.array(tokens[begin:])
        logits -= logits.max(axis=1, keepdims=True)
        sums = np.log(np.exp(logits).sum(axis=1))
        lost += float((sums - logits[np.arange(len(asked)), asked]).sum())
        likeliest += int((logits.argmax(axis=1) == asked).sum())
        number += len(asked)
    return {
        "perplexity": round(math.exp(lost / number), 4),
        "likeliest": round(likeliest / number, 4),
        "tokens": number,
        "answers": len(answers),
    }


def _of_artefact(folder: Path) -> Predict:
    backend = load(folder, device="cpu")

    def predict(tokens: list[int], begin: int) -> Logits:
        length = len(tokens)
        slot = backend.open_slot(length)
        window = Window(
            0,
            (*tokens[:-1], backend.info.mask_id),
            length - 1,
            tuple(range(1, length + 1)),
            num_to_verify=length - 1 - begin,
        )
        logits = backend.logits(StepRow(slot, window))
        backend.close_slot(slot)
        return logits[begin - length :]

    return predict


def _of_checkpoint(path: Path) -> Predict:
    import torch

    from d2f_runtime.models.checkpoints import load_checkpoint
    from d2f_runtime.models.masks import block_causal_mask

    model = load_checkpoint(path, dtype=torch.float32)
    never = list(model.config.forbidden_ids)  # nor does the graph predict them

    @torch.no_grad()
    def predict(tokens: list[int], begin: int) -> Logits:
        length = len(tokens) - 1
        visible = torch.arange(1, length + 1)[None]
        mask = block_causal_mask(torch.zeros(1, dtype=torch.long), visible, 0)
        hidden, _ = model(torch.tensor([tokens[:-1]]), torch.arange(length)[None], mask)
        found: Logits = model.logits(hidden[0, begin - 1 :]).numpy()
        found[:, never] = found[:, model.config.num_tokens :] = -np.inf
        return found

    return predict


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
