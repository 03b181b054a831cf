"""How far each quantisation is from a reference: agreement of proposals, answers and accuracy.

    python -m lab.bench.agreement export/checkpoints/word-problems --device cuda --output FILE

One session at a time for the agreement, two for the accuracy, as a stream would run: many rows at
once take another path through the kernels.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from d2f_export.onnx.verify import compare_backends
from d2f_runtime.backends import open_backend
from d2f_runtime.backends.base import Backend
from d2f_runtime.models.manifest import read_manifest
from d2f_runtime.provenance import environment
from d2f_runtime.text.tokenizer import Tokenizer
from lab.embedded_model.evaluate import evaluate, held_out
from lab.records import command_of

__all__ = ["agreement", "main"]


def agreement(
    folder: Path,
    quantizations: Sequence[str],
    *,
    reference: str,
    device: str,
    num_problems: int,
    num_prompts: int,
) -> dict[str, Any]:
    """Return accuracy and agreement with the reference for each quantisation.

    Args:
        folder: of the model, with a manifest.
        quantizations: of the torch backend.
        reference: the quantisation that the others are compared with.
        device: "cuda" or "cpu".
        num_problems: for the accuracy.
        num_prompts: for the agreement, the first ones.
    """
    codec, sample = Tokenizer(folder / "tokenizer.json"), held_out(num_problems)
    prompts = [codec.encode(problem.question) for problem in sample[:num_prompts]]
    led = _opened(folder, reference, device)
    params = read_manifest(folder).params_for(led.info.device)
    results: dict[str, Any] = {}
    for quantization in quantizations:
        backend = led if quantization == reference else _opened(folder, quantization, device)
        report = evaluate(quantization, backend, codec, sample, params, rows=2)
        found: dict[str, Any] = {"accuracy": report.to_dict()}
        if backend is not led:
            found["agreement"] = asdict(compare_backends(led, backend, prompts, params))
            backend.close()
        results[quantization] = found
    led.close()
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments, compare, print and record."""
    parser = argparse.ArgumentParser(prog="python -m lab.bench.agreement", description=__doc__)
    parser.add_argument("folder", type=Path, help="a checkpoint with a manifest")
    parser.add_argument("--quantization", action="append", help="repeat; default: all on a GPU")
    parser.add_argument("--reference", default="bf16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--output", type=Path)
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(given)
    results = agreement(
        arguments.folder,
        arguments.quantization or ["fp32", "bf16", "fp8", "int8", "nf4"],
        reference=arguments.reference,
        device=arguments.device,
        num_problems=arguments.problems,
        num_prompts=arguments.prompts,
    )
    origin = environment(command_of("lab.bench.agreement", given))
    text = json.dumps({"benchmark": "agreement", **origin, "results": results}, indent=2) + "\n"
    sys.stdout.write(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


def _opened(folder: Path, quantization: str, device: str) -> Backend:
    return open_backend("torch", folder, device=device, quantization=quantization)


if __name__ == "__main__":
    main()
