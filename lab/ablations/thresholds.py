"""What the decoder's settings trade: block sizes, thresholds and acceptance rules on one model.

Needs no training, and on a GPU a few seconds for each setting. The systems that D2F is compared
with, and speed, are the sweep benchmark's (lab.bench sweep). Records hold what became of
each problem, so that settings can be compared on the same ones.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from d2f_runtime.backends.base import Backend
from d2f_runtime.decoding.policy import AcceptancePolicy, ThresholdPolicy
from d2f_stream.core.params import GenerationParams, ParamOverrides

if TYPE_CHECKING:
    from d2f_runtime.evaluation.answers import Answer
    from d2f_runtime.models.transformer import Transformer
    from d2f_runtime.text.tokenizer import TextCodec
    from lab.embedded_model.problems import Problem
from lab.records import whole_lines

__all__ = ["FactorPolicy", "Setting", "add_arguments", "round_weights", "settings"]

Rule = Literal["token", "factor"]
VALUES: Final = (0.9, 0.99, 0.95, 0.8, 0.7, 0.5)
NAMES: Final = ("block_size", "max_active_blocks", "add_threshold", "activate_threshold")


@dataclass(frozen=True, slots=True)
class FactorPolicy:
    """Fast-dLLM's factor rule (arXiv 2505.22618): the n surest while (n + 1) doubts < factor."""

    factor: float = 1.0

    def accept(
        self,
        masked: Sequence[int],
        confidence: Sequence[float],
        rank: Sequence[float],
        *,
        fully_activated: bool,
    ) -> Sequence[int]:
        """Return what passes, or the best proposal where one is forced."""
        order = sorted(masked, key=lambda offset: (-confidence[offset], offset))
        passing = itertools.takewhile(
            lambda place: (place[0] + 2) * (1 - confidence[place[1]]) < self.factor,
            enumerate(order),
        )
        offsets = sorted(offset for _, offset in passing)
        if offsets or not fully_activated:
            return offsets
        return [max(masked, key=rank.__getitem__)]


@dataclass(frozen=True, slots=True)
class Setting:
    """A rule with its value, and what else differs from the defaults."""

    rule: Rule
    value: float
    overrides: ParamOverrides

    @property
    def policy(self) -> AcceptancePolicy:
        """The rule."""
        match self.rule:
            case "token":
                return ThresholdPolicy(self.value)
            case "factor":
                return FactorPolicy(self.value)

    @property
    def params(self) -> GenerationParams:
        """What else the decoder needs."""
        return GenerationParams(max_new_tokens=192).with_overrides(self.overrides)

    def to_dict(self) -> dict[str, Any]:
        """Return what a record says of it."""
        params = self.params
        kept = {name: getattr(params, name) for name in NAMES}
        return {**kept, "acceptance": self.rule, "confidence_threshold": self.value}


def settings() -> Iterator[Setting]:
    """Yield all settings, the most telling first."""
    for active in (4, 1):
        for value, size in itertools.product(VALUES, (16, 32, 64)):
            shape: ParamOverrides = {"block_size": size, "max_active_blocks": active}
            yield Setting("token", value, shape)
        for size in (16, 32, 64):
            yield Setting("factor", 1.0, {"block_size": size, "max_active_blocks": active})
    for value, size in itertools.product(VALUES, (8, 48)):
        yield Setting("token", value, {"block_size": size})
    for value, size in itertools.product((0.9, 0.99), (32, 64, 16)):
        for add in (0.3, 0.5, 0.7, 1.0):
            yield Setting("token", value, {"block_size": size, "add_threshold": add})
        for activate in (0.5, 0.7, 0.85):
            yield Setting("token", value, {"block_size": size, "activate_threshold": activate})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of python -m lab.ablations thresholds."""
    parser.add_argument("model", type=Path, help="a checkpoint or, on the CPU, an ONNX artefact")
    parser.add_argument("--tokenizer", type=Path, help="where the folder has none")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines; goes on from there")
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--block-size", type=int, nargs="+", help="these only")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--rounded", action="store_true", help="a checkpoint's weights as an int8 artefact has them"
    )
    parser.add_argument("--max-seconds", type=float, default=float("inf"))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Decode held-out problems under every setting that the file lacks."""
    from rich.console import Console
    from rich.progress import Progress

    from d2f_runtime.evaluation.answers import decode_all
    from d2f_runtime.text.tokenizer import Tokenizer
    from lab.ablations.command import note_origin
    from lab.embedded_model.evaluate import held_out, report

    end, output = time.monotonic() + arguments.max_seconds, arguments.output
    name = arguments.model.name + (", rounded" if arguments.rounded else "")
    backend = _opened(arguments.model, arguments.device, rounded=arguments.rounded)
    codec = Tokenizer(arguments.tokenizer or arguments.model / "tokenizer.json")
    sample, every = held_out(arguments.problems), list(settings())
    if arguments.block_size:
        every = [setting for setting in every if setting.params.block_size in arguments.block_size]
    prompts = [codec.encode(problem.question) for problem in sample]
    done = _recorded(output)
    note_origin(output.with_suffix(".runs.jsonl"))
    with Progress(console=Console(stderr=True)) as bar:
        for setting in bar.track(every, description="settings"):
            key = (name, len(sample), setting.to_dict())
            if key in done or time.monotonic() > end:
                continue
            answers = decode_all(backend, prompts, setting.params, policy=setting.policy)
            result = report(name, setting.to_dict(), sample, answers, codec)
            record = result.to_dict() | _each(sample, answers, codec)
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, separators=(",", ":")) + "\n")
            bar.console.print(result.line(), highlight=False, markup=False, soft_wrap=True)


def _each(
    sample: Sequence["Problem"], answers: Sequence["Answer"], codec: "TextCodec"
) -> dict[str, Any]:
    """Return for each problem whether it was right, its useful tokens and its steps."""
    from lab.embedded_model.problems import is_correct

    right = [is_correct(p, codec.decode(a.tokens)) for p, a in zip(sample, answers, strict=True)]
    return {
        "right": "".join(str(int(ok)) for ok in right),
        "tokens": [answer.num_useful for answer in answers],
        "steps": [answer.num_steps for answer in answers],
    }


def _opened(folder: Path, device: str, *, rounded: bool) -> Backend:
    """Open an artefact as it is, and a checkpoint in fp32: many rows a step need no fast step."""
    from d2f_runtime.backends import choose_backend, open_backend

    if choose_backend(folder, "auto", device=device) == "onnx":
        return open_backend("onnx", folder, device="cpu", quantization="auto")
    import torch

    from d2f_runtime.backends.torch_backend import TorchBackend
    from d2f_runtime.models.checkpoints import load_checkpoint

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_checkpoint(folder, device=device, dtype=torch.float32)
    if rounded:
        round_weights(model)
    return TorchBackend(model, name=folder.name, device=device, runner="plain")


def round_weights(model: "Transformer") -> None:
    """Give every matrix the weights that it has in an int8 artefact; products stay in fp32."""
    import torch

    from d2f_export.onnx.whole_matrices import pack_int8

    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                levels, scales = pack_int8([weight.cpu()])
                weight.copy_(torch.from_numpy((levels * scales).T))


def _recorded(output: Path) -> list[tuple[str, int, dict[str, Any]]]:
    """Return models, numbers of problems and settings; a last line that is not whole is dropped."""
    records = map(json.loads, whole_lines(output).splitlines())
    return [(r["model"], r["num_problems"], r["setting"]) for r in records]
